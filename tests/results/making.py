"""Records for tests: valid in every field, made from a few."""

import json
from dataclasses import fields
from typing import Any

from longthink.lab.results.records import Fidelity, Measurement, Reading, Sample, Setup

SETUP: dict[str, Any] = dict(
    model="reasoner",
    revision=None,
    dtype="float32",
    policy="dense",
    switches='{"name": "dense", "page_size": 16}',
    budget=None,
    decode_budget=None,
    task="reasoner/m/chain",
    seed=0,
    temperature=0.0,
    top_p=None,
    top_k=None,
    max_new_tokens=512,
)
MADE: dict[str, Any] = dict(
    versions=json.dumps({"longthink": "0.1.0", "python": "3.12.1", "torch": "2.11.0"}),
    hardware=json.dumps({"machine": "x86_64", "processor": "A Processor", "cores": 2}),
    created="2026-03-01T12:00:00+00:00",
)
SETUP_FIELDS = {field.name for field in fields(Setup)}


def make_sample(**changes: Any) -> Sample:
    """Return a right answer to problem p0, with the given fields changed; the policy's switches follow its text."""
    setup = SETUP | {name: value for name, value in changes.items() if name in SETUP_FIELDS}
    if "policy" in changes and "switches" not in changes:
        setup["switches"] = json.dumps({"name": changes["policy"]})
    answer: dict[str, Any] = dict(
        problem="p0",
        sample=0,
        prompt_tokens=40,
        generated_tokens=200,
        text="so the answer is 7",
        answer="7",
        gold="7",
        correct=True,
        finish="stop",
        ms_per_token_early=4.0,
        ms_per_token_late=5.0,
        seconds=1.5,
        rows=4,
        kv_bytes_peak=65536,
        dense_kv_bytes=245760,
        evicted=0,
    )
    rest = {name: value for name, value in changes.items() if name not in SETUP_FIELDS}
    return Sample(**(setup | answer | MADE | {"config": Setup(**setup).config_hash} | rest))


def make_measurement(**changes: Any) -> Measurement:
    """Return a point of a memory curve, with the given fields changed."""
    point: dict[str, Any] = dict(
        run="run0",
        kind="memory",
        system="raas",
        model="reasoner",
        dtype="float32",
        budget=None,
        decode_budget=128,
        rows=1,
        prompt_tokens=32,
        decode_tokens=256,
        ms_per_token=3.0,
        ms_per_token_low=2.9,
        ms_per_token_high=3.2,
        seconds=0.8,
        kv_bytes=163840,
        metadata_bytes=2048,
        rss_bytes=None,
        device_bytes=None,
        fast_forwarded=False,
        threads=1,
    )
    return Measurement(**(point | MADE | changes))


def make_fidelity(**changes: Any) -> Fidelity:
    """Return the measurement of a text, with the given fields changed."""
    reading: dict[str, Any] = {
        name: SETUP[name] for name in ("model", "revision", "dtype", "switches", "budget")
    }
    reading |= dict(policy="raas", decode_budget=64, source="texts", max_tokens=None, sure=0.5, lost=0.5)
    reading |= {name: value for name, value in changes.items() if name in reading}
    result: dict[str, Any] = dict(
        text="t0", prompt_tokens=10, decoded_tokens=164, tokens=100, nll_dense=50.0, nll=60.0, kl=5.0, differs=9,
        long_tokens=0, long_nll_dense=0.0, long_nll=0.0, long_kl=0.0, long_differs=0, evicted=36, kv_bytes=1000,
        dense_kv_bytes=2000, seconds=0.1,
    )  # fmt: skip
    result |= {name: value for name, value in changes.items() if name not in reading}
    return Fidelity(**(reading | result | MADE | {"config": Reading(**reading).config_hash}))
