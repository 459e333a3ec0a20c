"""What tests of models share: one small model and a prompt, and a compiler that is quick."""

import pytest
import torch
from torch._dynamo.utils import counters

from longthink.hf import step
from tests.models import build, prompt


@pytest.fixture(scope="module")
def model():
    return build("qwen2")


@pytest.fixture
def ids():
    return prompt((20,))[0]


@pytest.fixture
def model_is_left_alone(model):
    yield
    assert model.config._attn_implementation == "sdpa"
    assert not model.training


@pytest.fixture
def light_compiler(monkeypatch):
    """The part of the compiler that finds one program and guards it, without what makes that program fast."""
    counters.clear()
    monkeypatch.setattr(step, "few_rows_backend", "eager")
    yield
    torch.compiler.reset()
    step._programs.clear()
