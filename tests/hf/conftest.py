"""What tests of compiled steps share."""

import pytest
import torch
from torch._dynamo.utils import counters

from longthink.hf import step


@pytest.fixture
def light_compiler(monkeypatch):
    """The part of the compiler that finds one program and guards it, without what makes that program fast."""
    counters.clear()
    monkeypatch.setattr(step, "few_rows_backend", "eager")
    yield
    torch.compiler.reset()
    step._programs.clear()
