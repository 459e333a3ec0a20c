"""What tests for a GPU share. Those marked `gpu` skip where there is none.

``LONGTHINK_REHEARSE_GPU=1`` lets them run on a CPU, as far as they can, with stand-ins in torch for the kernels: that
shows that a test does what it says, and nothing about a GPU.
"""

import os

import pytest
import torch
from torch._dynamo.utils import counters

import longthink
from longthink.hf import step
from longthink.policies import Policy
from tests import fused as stand_ins

REHEARSED = os.environ.get("LONGTHINK_REHEARSE_GPU") == "1" and not torch.cuda.is_available()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available() and not REHEARSED:
        pytest.skip("needs a CUDA GPU, and there is none here")


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if REHEARSED else "cuda")


@pytest.fixture
def take_route(monkeypatch):
    """Give the fused steps of a route, by class of policy, for `longthink.hf.PagedCache`."""

    def take(route: str, policy: Policy) -> dict:
        if route == "general":
            return {}
        if REHEARSED:
            stand_ins.force(monkeypatch)
        from longthink.accelerators.table import FUSED

        assert type(policy) in FUSED
        return FUSED

    return take


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that has seen nothing; in a rehearsal, the part of it that makes no machine code."""
    counters.clear()
    if REHEARSED:
        monkeypatch.setattr(step, "few_rows_backend", "eager")
    yield
    torch.compiler.reset()
    step._programs.clear()


def specs() -> list[str]:
    """All policies, and those of their options that take another way through the kernels."""
    return [
        *longthink.available_policies(),
        "raas:score=exact",
        "raas:used=alpha:alpha=0.05",
        "raas:sharing=layer",
        "h2o:pin_prompt=true",
        "streaming_llm:positions=logical",
    ]
