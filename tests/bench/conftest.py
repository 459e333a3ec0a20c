"""A small random model, and plans for it."""

import pytest

from bench.command import run
from longthink.config import Budget
from longthink.lab.bench.models import bench_model
from longthink.lab.bench.plan import Plan

LAYERS, KV_HEADS, DIM = 2, 2, 8
MODEL = f"random:layers={LAYERS},hidden=32,heads=4,kv_heads={KV_HEADS},head_dim={DIM}"
POLICIES = ("dense", "raas", "quest", "h2o", "streaming_llm", "recency", "random", "recency:page_size=16")
PER_TOKEN = 2 * LAYERS * KV_HEADS * DIM * 4
"""Bytes of the keys and values of one token."""


@pytest.fixture(scope="module")
def loaded():
    return bench_model(MODEL, device="cpu")


@pytest.fixture
def plan():
    def make(**changes):
        values = {
            "model": MODEL,
            "device": "cpu",
            "policies": POLICIES,
            "baselines": ("dynamic", "static"),
            "budget": Budget(budget=96),
            "lengths": (96, 200),
            "prompt": 20,
            "repeats": 1,
            "fast_forward": True,
        }
        return Plan(**values | changes)

    return make


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a command of `bench` in this process; returns exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def call_it(command, *arguments):
        capsys.readouterr()
        code = run(command, "bench", [str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call_it
