"""Small random models of every supported architecture, for tests."""

from collections.abc import Callable

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 97
PAD, BOS, EOS = 0, 1, 2
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
TINY = dict(
    vocab_size=96,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
"""Sizes that configurations of all kinds of models take."""
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
ARCHITECTURES: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen2": lambda **more: Qwen2ForCausalLM(Qwen2Config(**_SIZES | more)),
    "mistral": lambda **more: MistralForCausalLM(MistralConfig(**_SIZES | {"sliding_window": None} | more)),
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**_SIZES | more)),
    "qwen3": lambda **more: Qwen3ForCausalLM(Qwen3Config(**_SIZES | more)),
    "qwen3_moe": lambda **more: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES | _MOE | more)),
}


def build(architecture: str, seed: int = 0, **more) -> PreTrainedModel:
    """Random model whose weights are large enough for attention to matter and text not to loop."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture](**more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6)
    # Generation in tests ends where the test says, unless it asks for an end token.
    model.generation_config.eos_token_id = None
    return model


def prompt(lengths: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of the given lengths, left-padded, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, longest - length :] = 1
    return ids, mask
