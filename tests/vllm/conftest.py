"""Tiny random models on disk. These tests need vLLM: `make test-vllm` installs it in its own environment."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.bpe import byte_level_bpe

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = dict(
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=16384,
    tie_word_embeddings=False,
)


def random_model(config, scale):
    """A random model with weights large enough for attention to affect the tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
    return model


def save_model(folder, config_class, **more):
    """Save a random model with a byte-level tokenizer and a chat template."""
    tokenizer = byte_level_bpe(["the quick brown fox " * 5], vocab_size=300, special=["<|endoftext|>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = config_class(**SIZES | dict(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0) | more)
    model = random_model(config, 6)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory):
    from transformers import Qwen2Config

    return save_model(tmp_path_factory.mktemp("qwen2"), Qwen2Config)
