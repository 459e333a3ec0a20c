"""Targets against given measurements: the arithmetic, and what is said where something is missing."""

import pytest

from bench.peers.measure import Results, Timing
from bench.peers.plan import CONTROL, FLOOR, LONG, MIDDLE, NARROW, SHORT, Case
from bench.peers.targets import targets
from longthink.lab.results.records import Measurement


def timed(system, *ms, context=MIDDLE, scene=0, kv=1000, extra=0, model="S8", **case):
    case = Case(system=system, context=context, **case)
    row = Measurement(
        run=f"run/{scene}/{case.label}/{context}", kind="batch" if case.rows > 1 else "peers",
        system=case.label, model=model, dtype="float32",
        budget=None, decode_budget=None, rows=case.rows, prompt_tokens=0, decode_tokens=context,
        ms_per_token=sorted(ms)[len(ms) // 2], ms_per_token_low=min(ms), ms_per_token_high=max(ms), seconds=None,
        kv_bytes=kv, metadata_bytes=extra, rss_bytes=None, device_bytes=None, fast_forwarded=True, threads=1,
        versions="{}", hardware="{}", created="",
    )  # fmt: skip
    return Timing(scene=scene, batch=case.rows > 1, model=model, case=case, ms=ms, read_bytes=None, row=row)


def results(*measured, **missing):
    return Results(timings=list(measured), missing=missing)


def one(text, *measured, model="S8", **missing):
    (target,) = [t for t in targets(results(*measured, **missing), [model]) if t.text.startswith(text)]
    return target


def test_a_ratio_is_taken_within_each_round():
    """The medians are 4 and 2, whose ratio is 2; the ratios are 1, 1 and 4."""
    target = one("our dense", timed("dense", 1, 4, 8), timed("raas", 1, 4, 2))
    assert (target.measured, target.low, target.high, target.met) == (1, 1, 4, False)


@pytest.mark.parametrize(("ms", "met"), [(4.5, True), (4.49, False)])
def test_at_least(ms, met):
    assert one("our dense", timed("dense", ms), timed("raas", 1)).met is met


@pytest.mark.parametrize(("ms", "met"), [(0.95, True), (0.96, False)])
def test_at_most(ms, met):
    assert one("RaaS / OpenVINO", timed("raas", ms), timed("openvino f32 eviction", 1)).met is met


def test_the_best_dense_cache_is_the_fastest_at_that_context():
    target = one(
        "best dense",
        timed("hf dynamic", 9),
        timed("hf static", 7),
        timed("hf static compiled", 5),
        timed("hf static", 1, context=SHORT),
        timed("raas", 2),
    )
    assert (target.measured, target.remark) == (2.5, "hf static compiled")


def test_lengths_and_modes_are_told_apart():
    measured = [
        timed("raas", 10, context=SHORT),
        timed("raas", 20),
        timed("raas", 30, context=LONG),
        timed("raas", 21, mode="generate"),
        timed("raas", 16, mode=NARROW),
        timed("openvino f32 eviction", 20),
    ]
    assert one("RaaS after 32k", *measured).measured == 3
    assert one("longthink.generate", *measured).measured == pytest.approx(1.05)
    assert one("RaaS / OpenVINO", *measured).measured == 1
    assert one("RaaS with bfloat16", *measured).measured == pytest.approx(0.8)


def test_a_share_is_what_the_control_leaves():
    target = one("bookkeeping of RaaS", timed("raas", 10, 10), timed(CONTROL, 9, 8, context=160))
    assert target.measured == pytest.approx(0.15)
    assert (target.percent, target.met) == (True, False)
    assert "10.00 ms, 8.50 ms without" in target.remark


def test_systems_of_different_scenes_or_models_are_not_compared():
    assert one("our dense", timed("dense", 9, scene=0), timed("raas", 1, scene=1)).measured is None
    assert one("our dense", timed("dense", 9, model="S2"), timed("raas", 1)).measured is None


def test_batches_are_compared_row_for_row():
    measured = [timed("hf static", 90, rows=16, model="S2"), timed("raas", 10, rows=16, model="S2")]
    assert one("RaaS tokens/s", *measured, model="S2").measured == 9
    assert not [t for t in targets(results(*measured), ["S8"]) if t.text.startswith("RaaS tokens/s")]


def test_bytes_are_those_of_all_contexts_and_must_not_grow():
    floor = timed(FLOOR, 1, kv=1000)
    same = [timed("raas", 1, context=n, kv=1000, extra=60) for n in (SHORT, LONG)]
    target = one("RaaS bytes", floor, *same)
    assert (target.measured, target.met, target.remark) == (1.06, True, "constant")
    assert one("RaaS bytes", floor, *same, timed("raas", 1, kv=500, mode=NARROW)).remark == "constant"
    grown = one("RaaS bytes", floor, *same, timed("raas", 1, kv=1000, extra=90))
    assert (grown.measured, grown.met, grown.remark) == (1.09, False, "NOT constant")


def test_what_is_missing_is_said_with_its_reason():
    target = one("kvpress", timed("raas", 1), **{"kvpress decoding": "no network"})
    assert (target.measured, target.met, target.remark) == (None, None, "kvpress decoding: no network")
    assert one("kvpress", timed("raas", 1)).remark == "not asked for"
    assert all(target.measured is None for target in targets(results(), ["S8", "S2"]))
