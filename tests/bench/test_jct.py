"""The order in which systems take turns, and the rows that come of it. No test depends on a time."""

import dataclasses
import json

import pytest
import torch

from longthink.lab.bench import jct
from longthink.lab.bench.jct import blocks_in_all, measure_jct, take_turns
from longthink.lab.bench.plan import BLOCK
from longthink.policies.base import PAGE_SIZES
from tests.bench.conftest import MODEL, POLICIES
from tests.grids import by_day

SYSTEMS = ("hf dynamic", "hf static", *POLICIES)


class Recording:
    """A system whose steps take as long as it says, on a clock of its own."""

    now = 0.0

    def __init__(self, name, seconds, log):
        self.name, self.prompt_BN = name, torch.zeros(1, 1)
        self._seconds, self._log = iter(seconds), log

    def decode(self, steps):
        self._log.append((self.name, steps))
        Recording.now += steps * next(self._seconds)


@pytest.fixture
def own_clock(monkeypatch):
    monkeypatch.setattr(Recording, "now", 0.0)
    monkeypatch.setattr(jct, "clock", lambda device: lambda: Recording.now)


def test_systems_take_turns_block_by_block(own_clock):
    log, told = [], []
    made = [Recording("a", [9, 1, 2, 3], log), Recording("b", [9, 4, 5, 6], log)]
    times = take_turns(made, 3, told.append)
    assert log == [("a", BLOCK), ("b", BLOCK)] * 4
    assert told == ["a", "b"] * 4
    # The first block of each warms up and does not count.
    assert times == {"a": pytest.approx([1000, 2000, 3000]), "b": pytest.approx([4000, 5000, 6000])}


def test_every_page_size_divides_a_block():
    assert all(BLOCK % size == 0 for size in PAGE_SIZES)


@pytest.mark.slow
def test_rows_are_complete_and_come_length_by_length(loaded, plan):
    told = []
    rows = list(measure_jct(plan(), loaded, lambda done, name: told.append((done, name))))
    assert [(row.decode_tokens, row.system) for row in rows] == [
        (n, s) for n in (0, 96, 200) for s in SYSTEMS
    ]
    assert told == [(i, SYSTEMS[i % len(SYSTEMS)]) for i in range(blocks_in_all(plan()))]
    assert len({(row.run, row.decode_tokens) for row in rows}) == len(rows)
    assert len({row.run for row in rows}) == len(SYSTEMS)
    assert len({row.run.partition("/")[0] for row in rows}) == 1
    for row in rows:
        missing = [field.name for field in dataclasses.fields(row) if getattr(row, field.name) is None]
        not_read = ["rss_bytes", "device_bytes", "decode_budget"]
        assert [name for name in missing if name != "budget"] == sorted(not_read, key=missing.index)
        assert row.budget == (None if row.system in ("hf dynamic", "hf static", "dense") else 96)
        assert (row.kind, row.model, row.dtype) == ("jct", MODEL, "float32")
        assert (row.rows, row.prompt_tokens, row.threads, row.fast_forwarded) == (1, 20, 1, True)
        assert 0 < row.ms_per_token_low <= row.ms_per_token <= row.ms_per_token_high
        assert {"torch", "transformers", "longthink"} <= json.loads(row.versions).keys()
        assert "processor" in json.loads(row.hardware)
    for name in SYSTEMS:
        seconds = [row.seconds for row in rows if row.system == name]
        assert 0 < seconds[0] < seconds[1]
    held = [row.kv_bytes for row in rows if row.system == "dense"]
    assert held == sorted({*held}) and len(held) == 3


@pytest.mark.slow
def test_decoding_really_gives_the_same_rows_but_for_the_times(loaded, plan):
    each_kind = ("dense", "raas", "quest", "h2o", "streaming_llm")  # grows; reads, and ranks pages or tokens

    def kept(fast):
        rows = measure_jct(plan(fast_forward=fast, policies=by_day(each_kind, POLICIES)), loaded)
        return [(row.system, row.decode_tokens, row.kv_bytes, row.metadata_bytes) for row in rows]

    assert kept(True) == kept(False)


@pytest.mark.slow
def test_the_record_says_when_it_was_really_decoded(loaded, plan):
    (row, *_) = measure_jct(plan(fast_forward=False, policies=("raas",), baselines=()), loaded)
    assert row.fast_forwarded is False


def test_completion_time_adds_up_the_steps(own_clock, loaded, plan, monkeypatch):
    """0.5 s for the prompt, then 1, 3 and 5 ms a token at 0, 96 and 200 tokens."""

    def pretend(systems, repeats, step):
        at = {0: 1.0, 96: 3.0, 200: 5.0}
        return {system.name: [at[system.decoded]] * repeats for system in systems}

    monkeypatch.setattr(jct, "take_turns", pretend)
    chosen = plan(policies=("recency",), baselines=("static",))
    made = jct.make_systems(loaded.model, chosen, room=64)
    for system in made:
        prefill = system._prefill
        monkeypatch.setattr(
            system, "_prefill", lambda n, b=prefill, s=system: (b(n), setattr(s, "prefill_seconds", 0.5))
        )
    monkeypatch.setattr(jct, "make_systems", lambda *arguments, **options: made)
    seconds = {(row.system, row.decode_tokens): row.seconds for row in measure_jct(chosen, loaded)}
    trapezoids = 0.5 + 96 * 0.002
    assert seconds["recency", 0] == pytest.approx(0.5)
    assert seconds["recency", 96] == pytest.approx(trapezoids)
    assert seconds["recency", 200] == pytest.approx(trapezoids + 104 * 0.004)
    # A static cache has its full size from the first token on, so its early tokens are not cheaper.
    assert seconds["hf static", 200] == pytest.approx(0.5 + 200 * 0.005)


def test_lengths_that_leave_no_room_for_the_timed_steps_are_refused(loaded, plan):
    with pytest.raises(
        ValueError, match="lengths=64,100: between 64 and 100 there is no room for the 64 steps"
    ):
        next(measure_jct(plan(lengths=(64, 100)), loaded))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ()}, "lengths is empty"),
        ({"lengths": (200, 100)}, "lengths=200,100 must rise"),
        ({"lengths": (0, 100)}, "lengths=0 is out of range: allowed is >= 1"),
        ({"prompt": 0}, "prompt=0 is out of range: allowed is >= 1"),
        ({"rows": 0}, "rows=0 is out of range"),
        ({"repeats": 0}, "repeats=0 is out of range"),
        ({"threads": 0}, "threads=0 is out of range"),
        ({"baselines": ("eager",)}, "baselines='eager' is not one of 'dynamic', 'static', 'compiled'"),
        ({"baselines": (), "policies": ()}, "policies and baselines are empty"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(plan, changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)
