"""``longthink advise`` from the command line."""

import json

import pytest

from tests.evaluate.data import write_lines

CHAIN = ("--tasks", "reasoner/s/chain", "-n", 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Shared by the tests: measurements and answers of one of them serve the others."""
    return tmp_path_factory.mktemp("advise") / "store"


def advise(call, store, *words):
    code, out, err = call("advise", *CHAIN, "--out", store, "--policies", "recency,quest", *words)
    assert code == 0, err
    return out, err


@pytest.mark.slow
def test_the_smallest_budget_that_is_near_dense(call, store):
    """A window of a chain of equations is far from dense, until it is nearly all of the text."""
    words = ("--decode-budgets", "32,64,120", "--gpu-memory", "1", "--json")
    found = json.loads(advise(call, store, *words, "--kl", "0.2")[0])
    measured = {(row["policy"], row["decode_budget"]): row["kl"]["mean"] for row in found["rows"]}
    assert measured.keys() == {(policy, size) for policy in ("recency", "quest") for size in (32, 64, 120)}
    near = [size for size in (32, 64, 120) if measured["recency", size] <= 0.2]
    # Quest grows with the text, so it is no advice.
    (one,) = found["advice"]
    assert (one["row"]["policy"], one["row"]["decode_budget"]) == ("recency", near[0]) and len(near) < 3
    assert one["requests"] >= one["dense_requests"] > 0 and found["accuracy"] is None
    none = json.loads(advise(call, store, *words, "--kl", "0")[0])
    assert none["advice"] == [] and none["rows"] == found["rows"]
    out, _ = advise(call, store, *words[:-1], "--kl", "0")
    assert "No policy is within 0 nats of Dense at any of the budgets" in out


@pytest.mark.slow
def test_answers_are_asked_as_well(call, store):
    words = ("--decode-budgets", "32,120", "--kl", "100")
    assert json.loads(advise(call, store, *words, "--json")[0])["advice"][0]["row"]["decode_budget"] == 32
    out, err = advise(call, store, *words, "--accuracy", "--json")
    found = json.loads(out)
    assert found["accuracy"]["dense"]["share"] == 1 and found["accuracy"]["recency 32"]["share"] == 0
    assert "recency 32: 0/1" in err
    for one in found["advice"]:
        assert one["row"]["decode_budget"] == 120 and one["accuracy"]["share"] == 1
    out, _ = advise(call, store, *words, "--accuracy")
    assert "Dense: 1/1" in out or "and solves as much as Dense" in out


def test_texts_without_answers_cannot_be_graded(call, tmp_path):
    texts = write_lines(tmp_path / "texts.jsonl", {"text": "a b c"})
    code, out, err = call("advise", "--data", texts, "--accuracy", "--out", tmp_path / "store")
    assert (code, out) == (2, "") and "--accuracy needs --tasks" in err
    assert not (tmp_path / "store").exists()


def test_an_unknown_task_is_named(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("advise", "--tasks", "nothing")
    assert code not in (0, None) and out == "" and "task='nothing' is unknown" in err
