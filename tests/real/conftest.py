"""A small pretrained model, SmolLM2-135M-Instruct, where LONGTHINK_MODELS names the folder that has it."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import call, quiet_environment  # noqa: F401  (fixtures)

NAME = "smollm2-135m"
QUESTION = "Tell me how bread is made, step by step."
LENGTH = 64
"""New tokens of `dense`, the text that others are compared with."""


@pytest.fixture(scope="session")
def folder():
    path = Path(os.environ.get("LONGTHINK_MODELS", ""), NAME)
    if "LONGTHINK_MODELS" not in os.environ or not (path / "config.json").is_file():
        pytest.skip(f"LONGTHINK_MODELS names no folder with {NAME}")
    return path


@pytest.fixture(scope="session")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def model(folder):
    """In float32: equal texts must not hang on the rounding of narrower numbers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def ids(tokenizer):
    """The question in the template of the model, 1 x N."""
    messages = [{"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


@pytest.fixture(scope="session")
def dense(model, ids):
    """What transformers writes without us: question and answer, 1 x N."""
    return model.generate(ids, max_new_tokens=LENGTH, do_sample=False)
