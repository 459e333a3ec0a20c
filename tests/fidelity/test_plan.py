"""What is asked of a measurement of fidelity: texts, cells, units of work."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longthink.config import DEFAULT_POLICY
from longthink.errors import BudgetError, DataError
from longthink.lab.fidelity.plan import Group, Plan, Unit
from longthink.lab.fidelity.texts import Text, read_texts
from longthink.lab.results.records import Reading
from longthink.lab.work.driver import Identity

IDENTITY = Identity(revision=None, dtype="float32")


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_questions_with_reasoning_and_plain_text_are_read(tmp_path):
    asked = write(
        tmp_path / "a.jsonl",
        {"id": "x", "problem": "2 + 2?", "Reasoning": "It is 4.", "text": "not this"},
        {"question": "3 + 3?", "generation": "6"},
    )
    first, second = read_texts([asked])
    assert first == Text(source="a", id="x", question="2 + 2?", body="It is 4.")
    assert (second.question, second.body, len(second.id)) == ("3 + 3?", "6", 12)
    rows = pa.table({"text": ["once upon a time", "there was"], "uid": ["p", "q"]})
    pq.write_table(rows, tmp_path / "b.parquet")
    plain = read_texts([tmp_path / "b.parquet"], 1)
    assert plain == [Text(source="b", id="p", question=None, body="once upon a time")]


@pytest.mark.parametrize(
    "records, fault",
    [
        ([{"question": "why?"}], "line 1: expected a question .* found question"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "line 2: text 'a' is also at .*line 1"),
        ([{"text": "x"}, {"text": "x"}], "line 2: text '.*' is also at .*line 1"),
        ([{"text": ["x"]}], "line 1: field 'text' is a list"),
        ([{"text": "  "}], "line 1: field 'text' is empty"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, records, fault):
    with pytest.raises(DataError, match=fault):
        read_texts([write(tmp_path / "a.jsonl", *records)])


def test_two_files_of_one_name_are_refused(tmp_path):
    (tmp_path / "b").mkdir()
    files = [write(folder / "a.jsonl", {"text": "x"}) for folder in (tmp_path, tmp_path / "b")]
    with pytest.raises(DataError, match="would both be source 'a'"):
        read_texts(files)


def test_policies_meet_budgets_and_what_keeps_everything_is_read_once():
    plan = Plan(data=("x.jsonl",), policies=("raas", "dense", "raas"), budgets=(64,), decode_budgets=(32, 48))
    assert [tuple(cache) for cache in plan.caches] == [
        ("raas", 64, None), ("raas", None, 32), ("raas", None, 48), ("dense", None, None),
    ]  # fmt: skip
    readings = {plan.reading(cache, "x", IDENTITY).config_hash for cache in plan.caches}
    other = dataclasses.replace(plan, max_tokens=9)
    assert len(readings | {other.reading(cache, "x", IDENTITY).config_hash for cache in plan.caches}) == 8
    assert Plan.from_json(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


def test_every_field_of_a_reading_is_in_its_hash():
    plan = Plan(data=("x.jsonl",), policies=("dense",))
    reading = plan.reading(plan.caches[0], "x", IDENTITY)
    for field in dataclasses.fields(Reading):
        changed = dataclasses.replace(reading, **{field.name: "other" if field.name != "sure" else 0.7})
        assert changed.config_hash != reading.config_hash, field.name


@pytest.mark.parametrize(
    "values, error, fault",
    [
        (dict(policies=()), ValueError, "policies is empty"),
        (dict(data=()), ValueError, "give data .* or tasks"),
        (dict(tasks=("reasoner/s",)), ValueError, "give data .* or tasks"),
        (dict(decode_budgets=()), BudgetError, "policy 'raas' needs a budget"),
        (dict(decode_budgets=(), budgets=(8,)), BudgetError, "budget=8 is too small .* allowed is >= 32"),
        (dict(max_tokens=0), ValueError, "max_tokens=0 is out of range: allowed is >= 1"),
        (dict(rows=0), ValueError, "rows=0"),
        (dict(dtype="int8"), ValueError, "dtype='int8'"),
    ],
)
def test_bad_plans_are_refused(values, error, fault):
    with pytest.raises(error, match=fault):
        Plan(**dict(data=("x.jsonl",), policies=("raas",), decode_budgets=(32,)) | values)


def test_a_unit_survives_the_way_to_a_worker():
    texts = (
        Text(source="s", id="1", question=None, body="ä"),
        Text(source="s", id="2", question="q", body=None, limit=3),
    )
    unit = Unit(group=Group(None, 32), policies=("raas", "dense"), texts=texts)
    assert Unit.from_json(json.loads(json.dumps(unit.to_json()))) == unit
    assert unit.key == "1, 2 at decode_budget=32"


def test_without_policies_the_default_is_measured_beside_raas_and_the_window():
    plan = Plan(data=("x.jsonl",), decode_budgets=(32,))
    assert [cache.policy for cache in plan.caches] == [DEFAULT_POLICY, "raas", "recency"]
