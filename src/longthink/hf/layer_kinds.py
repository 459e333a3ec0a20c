"""Kinds of cache layers in transformers: full attention, windows and chunks, convolutions and recurrent states."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from longthink.errors import UnsupportedModelError

FULL = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
"""Of these, layers of a cache of ours have pages instead of the keys and values."""
_WITHOUT_CACHE = ("moe", "mlp")
"""Types of layers that only compute."""


class _NoCache(LinearAttentionLayer):
    """Stands for a layer that only computes; transformers takes it for one that counts no columns."""


_NATIVE = (
    _NoCache,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    *filter(None, [getattr(cache_utils, "DummyLayer", None)]),  # from 5.20 on
)


def library_layers(config: PreTrainedConfig) -> list[Any]:
    """Empty cache layers as transformers gives them to a model of this configuration, one for each of its layers.

    Raises
    ------
    UnsupportedModelError
        If a layer is of a kind that no cache of ours has.
    """
    text = config.get_text_config(decoder=True)
    try:
        layers = list(DynamicCache(config=config).layers)
    except KeyError as error:
        raise UnsupportedModelError(f"layers of type {error.args[0]}") from error
    kinds = getattr(text, "layer_types", None) or [None] * len(layers)
    foreign = {
        str(kind or type(layer).__name__)
        for kind, layer in zip(kinds, layers, strict=False)
        if type(layer) not in (*FULL, *_NATIVE)
    }
    if foreign:
        raise UnsupportedModelError(f"layers of type {', '.join(sorted(foreign))}")
    return [
        _NoCache() if kind in _WITHOUT_CACHE else layer for kind, layer in zip(kinds, layers, strict=False)
    ]


def has_pages(layer: Any) -> bool:
    """Whether a layer of transformers has full attention, so that ours takes its place."""
    return type(layer) in FULL


def window_of(layer: Any) -> int | None:
    """Tokens that a layer with a window or chunks keeps at most; None for others."""
    return getattr(layer, "sliding_window", None)


def is_recurrent(layer: Any) -> bool:
    """Whether a layer keeps a state of all tokens, from which none can be taken back: recurrence or convolution."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, _NoCache)


def windowed_bytes(layer: Any) -> int:
    """Bytes allocated for the keys and values of a window."""
    if window_of(layer) is None or not layer.is_initialized:
        return 0
    # What they are views of is allocated as well: after a prompt, all of it until the next token.
    return sum(tensor.untyped_storage().nbytes() for tensor in (layer.keys, layer.values))


def recurrent_bytes(layer: Any) -> int:
    """Bytes allocated for recurrent states and convolutions."""
    if not is_recurrent(layer):
        return 0
    states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return sum(state.nbytes for state in states if state is not None)
