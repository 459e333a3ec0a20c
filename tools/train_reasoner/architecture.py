"""The model: a small Qwen2, as a function of its weights.

Arithmetic and parameter names are those of transformers' ``Qwen2ForCausalLM``, so the trained weights are a plain
Qwen2 checkpoint. Training uses this function because it passes ``is_causal`` to the attention kernel instead of a
mask, which is faster on long sequences on a CPU.

Shapes: B batch, T tokens, H query heads, K key/value heads, D head dim, C residual width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2Config

from longthink.reasoner.vocabulary import BOS, EOS, PAD, TOKEN_IDS, TOKENS
from tools.train_reasoner.config import TrainConfig

MAX_TOKENS = 4096
"""Longest sequence of prompt and chain of thought in training."""
ROPE_THETA = 1e6
"""Base of the rotary angles, so large that half of the dimensions barely rotate over thousands of positions."""
EMBEDDING = "model.embed_tokens.weight"


def model_config(config: TrainConfig) -> Qwen2Config:
    """Return the transformers configuration of the model that ``config`` trains."""
    return Qwen2Config(
        vocab_size=len(TOKENS),
        hidden_size=config.hidden,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        pad_token_id=TOKEN_IDS[PAD],
        bos_token_id=TOKEN_IDS[BOS],
        eos_token_id=TOKEN_IDS[EOS],
        architectures=["Qwen2ForCausalLM"],
        dtype="float32",
    )


def layer_prefix(layer: int) -> str:
    """Return the start of the parameter names of a layer."""
    return f"model.layers.{layer}."


def rope_frequencies(head_dim: int) -> Tensor:
    """Return the angle per position of each pair of dimensions (i, i + head_dim / 2)."""
    return ROPE_THETA ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rope_table(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of rotary position embedding, each ``[MAX_TOKENS, head_dim]``."""
    positions = torch.arange(MAX_TOKENS, dtype=torch.float32)
    angles = torch.outer(positions, rope_frequencies(head_dim)).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor) -> Tensor:
    first, second = x_BHTD.chunk(2, -1)
    return x_BHTD * cos_B1TD + torch.cat([-second, first], -1) * sin_B1TD


def _attention(
    x_BTC: Tensor,
    weights: Mapping[str, Tensor],
    prefix: str,
    config: Qwen2Config,
    cos_B1TD: Tensor,
    sin_B1TD: Tensor,
) -> Tensor:
    head_dim = config.hidden_size // config.num_attention_heads

    def project(name: str) -> Tensor:
        linear = f"{prefix}self_attn.{name}_proj"
        projected = F.linear(x_BTC, weights[f"{linear}.weight"], weights[f"{linear}.bias"])
        return projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    queries_BHTD = _rotate(project("q"), cos_B1TD, sin_B1TD)
    keys_BKTD = _rotate(project("k"), cos_B1TD, sin_B1TD)
    group = config.num_attention_heads // config.num_key_value_heads
    keys_BHTD, values_BHTD = (x.repeat_interleave(group, 1) for x in (keys_BKTD, project("v")))
    mixed_BHTD = F.scaled_dot_product_attention(queries_BHTD, keys_BHTD, values_BHTD, is_causal=True)
    return F.linear(mixed_BHTD.transpose(1, 2).flatten(2), weights[f"{prefix}self_attn.o_proj.weight"])


def forward(
    weights: Mapping[str, Tensor],
    config: Qwen2Config,
    ids_BT: Tensor,
    positions_BT: Tensor,
    cos_LD: Tensor,
    sin_LD: Tensor,
) -> Tensor:
    """Return the logits ``[B, T, V]`` of right-padded sequences.

    Parameters
    ----------
    weights
        Parameters under the names of ``Qwen2ForCausalLM``.
    config
        Shapes of the model.
    ids_BT
        Token ids.
    positions_BT
        Logical position of each token.
    cos_LD, sin_LD
        Tables from `rope_table`, longer than the last position.
    """
    width, eps = (config.hidden_size,), config.rms_norm_eps
    cos_B1TD, sin_B1TD = cos_LD[positions_BT][:, None], sin_LD[positions_BT][:, None]
    x_BTC = F.embedding(ids_BT, weights[EMBEDDING])
    for layer in range(config.num_hidden_layers):
        prefix = layer_prefix(layer)
        normed_BTC = F.rms_norm(x_BTC, width, weights[f"{prefix}input_layernorm.weight"], eps)
        x_BTC = x_BTC + _attention(normed_BTC, weights, prefix, config, cos_B1TD, sin_B1TD)
        normed_BTC = F.rms_norm(x_BTC, width, weights[f"{prefix}post_attention_layernorm.weight"], eps)
        gate = F.silu(F.linear(normed_BTC, weights[f"{prefix}mlp.gate_proj.weight"]))
        up = F.linear(normed_BTC, weights[f"{prefix}mlp.up_proj.weight"])
        x_BTC = x_BTC + F.linear(gate * up, weights[f"{prefix}mlp.down_proj.weight"])
    return F.linear(F.rms_norm(x_BTC, width, weights["model.norm.weight"], eps), weights[EMBEDDING])
