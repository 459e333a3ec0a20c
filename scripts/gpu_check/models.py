"""Models with real shapes and random weights, created on the device: nothing is downloaded."""

import time
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 256, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""The shapes of Qwen2.5-1.5B and Qwen2.5-7B, and one for machines without a GPU."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(shape: str, layers: int) -> Qwen2ForCausalLM:
    """Create a model in bfloat16 with the given number of layers."""
    sizes = SHAPES[shape]
    config = Qwen2Config(num_hidden_layers=layers, max_position_embeddings=1 << 17, **sizes)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device():
            return Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def prompts(model: Qwen2ForCausalLM, rows: int, tokens: int) -> torch.Tensor:
    """Random token ids, rows x tokens."""
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=drawn).to(model.device)


def weight_bytes(model: Qwen2ForCausalLM) -> int:
    """Bytes of the weights that a step reads, without an untied input embedding: of that it reads a row per token."""
    whole = sum(weight.nbytes for weight in model.parameters())
    return whole if model.config.tie_word_embeddings else whole - model.get_input_embeddings().weight.nbytes


class Head(nn.Module):
    """The parts of a step outside the layers: embedding, norm, logits, argmax."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        super().__init__()
        self.embed, self.norm, self.logits = model.model.embed_tokens, model.model.norm, model.lm_head

    def forward(self, token_B1: torch.Tensor) -> torch.Tensor:
        return self.logits(self.norm(self.embed(token_B1)))[:, -1:].argmax(-1)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Any) -> float:
    """Seconds that a call takes, including work on the device."""
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started
