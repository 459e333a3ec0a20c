"""What a cache of a model will take, from its configuration alone, before any weights are loaded."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from longthink.hf.layer_kinds import has_pages, is_recurrent, library_layers, window_of


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Layers of a model, and bytes of the caches of one row."""

    full: int
    windows: tuple[int, ...]  # tokens of each windowed layer
    recurrent: int
    itemsize: int
    kept_numbers: int  # of a token, kept by the layers with full attention
    dense_numbers: int  # of a token, kept by the same layers in transformers
    window_numbers: int  # of all windows

    @property
    def token_bytes(self) -> int:
        """Bytes of a token that the budget keeps."""
        return self.kept_numbers * self.itemsize

    def bounded_bytes(self, budget: int) -> int:
        """Bytes of a cache that keeps so many tokens, and of the windows."""
        return (budget * self.kept_numbers + self.window_numbers) * self.itemsize

    def dense_bytes(self, tokens: int) -> int:
        """Bytes of transformers' own cache for a text of so many tokens."""
        return (tokens * self.dense_numbers + self.window_numbers) * self.itemsize


def forecast(config: PreTrainedConfig) -> Forecast:
    """What caches of one row take; states of recurrent layers, which are small, are not counted.

    Raises
    ------
    UnsupportedModelError
        If a layer is of a kind that no cache of ours has.
    """
    text = config.get_text_config(decoder=True)
    layers = library_layers(config)
    dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.float32
    # Newer versions say of each layer what may differ between them; in others, full layers have fields of their own.
    own = getattr(text, "per_layer_config", None) or [text] * len(layers)
    kept = sum(
        _numbers(part, full=True) for part, layer in zip(own, layers, strict=False) if has_pages(layer)
    )
    windows = [(window_of(layer), part) for part, layer in zip(own, layers, strict=False)]
    held = [(window, _numbers(part, full=False)) for window, part in windows if window is not None]
    full = sum(map(has_pages, layers))
    rank = getattr(text, "kv_lora_rank", None)
    latents = rank and _keeps_latents(config)
    return Forecast(
        full=full,
        windows=tuple(window for window, _ in held),
        recurrent=sum(map(is_recurrent, layers)),
        itemsize=dtype.itemsize,
        # Differential attention: each KV head holds the values of two.
        kept_numbers=kept + kept // 2 if text.model_type == "diffllama" else kept,
        dense_numbers=full * (rank + text.qk_rope_head_dim) if latents else kept,
        window_numbers=sum(window * numbers for window, numbers in held),
    )


_OF_FULL_LAYERS = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
"""Fields that replace others in layers with full attention (Gemma 4)."""


def _numbers(text: Any, *, full: bool) -> int:
    """Numbers in the key and the value of a token, all heads of a layer."""

    def field(name: str) -> Any:
        own = getattr(text, _OF_FULL_LAYERS.get(name, name), None) if full else None
        return own or getattr(text, name, None)

    heads = text.num_attention_heads
    if field("kv_lora_rank"):
        return int(heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim))
    key = field("head_dim") or text.hidden_size // heads
    kv_heads = 1 if field("multi_query") else field("num_key_value_heads") or heads
    return int(kv_heads * (key + (field("v_head_dim") or key)))


def _keeps_latents(config: PreTrainedConfig) -> bool:
    """Whether transformers caches what keys and values are computed from, as its newer versions do."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    model = found[0] if isinstance(found, tuple) else found
    code = vars(sys.modules[model.__module__]) if model is not None else {}
    return any(hasattr(part, "expand_kv") for part in code.values())
