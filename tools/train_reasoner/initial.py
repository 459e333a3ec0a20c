"""Initial weights that can already look something up.

The task needs induction: from ``+bee`` find the token after ``bee:``. From random weights a small model needs tens of
millions of tokens to learn this, so the initial weights contain three things, all of which training may change:

1. The five forms of a name share a name vector. During training the embedding is a smaller basis (one row per name,
   one per form, one per other token), which the export expands.
2. Layer 0, key/value group 0: query head h attends to the token h + 1 positions back. Its query and key biases differ
   by the rotation of h + 1 positions, so the logit peaks there for all tokens.
3. Layer 1, head 0 matches its own name (subspace *own* of the residual stream) with the name that the first head
   copied from the previous token (subspace *previous*). Both use slowly rotating dimensions only, which are stable
   over thousands of positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2Config

from longthink.reasoner.vocabulary import FIRST_NAME_ID, FORMS, NAMES, TOKENS
from tools.train_reasoner.architecture import layer_prefix, rope_frequencies

BASIS = "embedding_basis"
"""Name of the trained embedding basis, which replaces the embedding matrix in a dictionary of weights."""
PREVIOUS_STRENGTH = 28.0
MATCH_STRENGTH = 4.0


def embedding_map() -> Tensor:
    """Return the matrix ``[vocabulary, basis rows]`` that turns the basis into token embeddings."""
    rows = torch.zeros(len(TOKENS), FIRST_NAME_ID + len(NAMES) + len(FORMS))
    rows[:FIRST_NAME_ID, :FIRST_NAME_ID] = torch.eye(FIRST_NAME_ID)
    for form in range(len(FORMS)):
        for name in range(len(NAMES)):
            token = FIRST_NAME_ID + form * len(NAMES) + name
            rows[token, FIRST_NAME_ID + name] = 1
            rows[token, FIRST_NAME_ID + len(NAMES) + form] = 1
    return rows


def initial_weights(config: Qwen2Config, seed: int) -> dict[str, Tensor]:
    """Return initial fp32 weights: `BASIS` and, under transformers' names, everything but the embedding."""
    generator = torch.Generator().manual_seed(seed)
    weights = _random_weights(config, generator)
    _add_previous_token_heads(weights, config)
    _add_lookup_head(weights, config, generator)
    return weights


def _random_weights(config: Qwen2Config, generator: torch.Generator) -> dict[str, Tensor]:
    width, mlp = config.hidden_size, config.intermediate_size
    kv_width = width * config.num_key_value_heads // config.num_attention_heads
    # Makes the variance of the residual stream independent of depth.
    out_scale = (2 * config.num_hidden_layers) ** -0.5

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * scale * columns**-0.5

    weights = {BASIS: torch.randn(embedding_map().shape[1], width, generator=generator) * 0.08}
    for layer in range(config.num_hidden_layers):
        prefix = layer_prefix(layer)
        weights[f"{prefix}input_layernorm.weight"] = torch.ones(width)
        for name, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows, width)
            weights[f"{prefix}self_attn.{name}_proj.bias"] = torch.zeros(rows)
        weights[f"{prefix}self_attn.o_proj.weight"] = normal(width, width, out_scale)
        weights[f"{prefix}post_attention_layernorm.weight"] = torch.ones(width)
        weights[f"{prefix}mlp.gate_proj.weight"] = normal(mlp, width)
        weights[f"{prefix}mlp.up_proj.weight"] = normal(mlp, width)
        weights[f"{prefix}mlp.down_proj.weight"] = normal(width, mlp, out_scale)
    weights["model.norm.weight"] = torch.ones(width)
    return weights


def _add_previous_token_heads(weights: dict[str, Tensor], config: Qwen2Config) -> None:
    head_dim = config.hidden_size // config.num_attention_heads
    attention, strength = f"{layer_prefix(0)}self_attn.", PREVIOUS_STRENGTH**0.5
    weights[f"{attention}k_proj.weight"][:head_dim] *= 0.1
    weights[f"{attention}k_proj.bias"][: head_dim // 2] = strength
    for head in range(config.num_attention_heads // config.num_key_value_heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        angle = -(head + 1) * rope_frequencies(head_dim)
        weights[f"{attention}q_proj.weight"][rows] *= 0.1
        weights[f"{attention}q_proj.bias"][rows] = strength * torch.cat([angle.cos(), angle.sin()])


def _add_lookup_head(weights: dict[str, Tensor], config: Qwen2Config, generator: torch.Generator) -> None:
    width = config.hidden_size
    head_dim = width // config.num_attention_heads
    half = head_dim // 2
    slow = [*range(half * 5 // 8, half), *range(half + half * 5 // 8, head_dim)]
    both = torch.linalg.qr(torch.randn(width, 2 * len(slow), generator=generator)).Q
    own, previous = both[:, : len(slow)], both[:, len(slow) :]
    rest = torch.eye(width) - both @ both.T

    names = slice(FIRST_NAME_ID, FIRST_NAME_ID + len(NAMES))
    directions = torch.nn.functional.normalize(torch.randn(len(NAMES), len(slow), generator=generator), dim=1)
    basis = weights[BASIS] @ rest
    basis[names] = 0.5 * basis[names] + directions @ own.T
    weights[BASIS] = basis

    # Layer 0 writes nothing else into the two subspaces.
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        weights[layer_prefix(0) + name] = rest @ weights[layer_prefix(0) + name]
    weights[f"{layer_prefix(0)}self_attn.v_proj.weight"][slow] = own.T
    weights[f"{layer_prefix(0)}self_attn.o_proj.weight"][:, slow] = previous

    attention = f"{layer_prefix(1)}self_attn."
    for name, subspace in (("q", own), ("k", previous)):
        weights[f"{attention}{name}_proj.weight"][:head_dim] *= 0.1
        weights[f"{attention}{name}_proj.weight"][slow] = MATCH_STRENGTH**0.5 * subspace.T
