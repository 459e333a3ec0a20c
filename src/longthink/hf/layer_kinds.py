"""Kinds of cache layers in transformers: full attention, windows and chunks, convolutions and recurrent states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from longthink.cache.window import Window
from longthink.errors import UnsupportedModelError
from longthink.hf.windows import WindowLayer

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
    *filter(None, [getattr(cache_utils, "DummyLayer", None)]),  # from 5.20 on
)


def library_layers(config: PreTrainedConfig) -> list[Any]:
    """Empty cache layers for a model of this configuration, one for each of its layers: transformers' own, but for
    windows.

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
        _NoCache() if kind in _WITHOUT_CACHE else _own(layer, kind, text)
        for kind, layer in zip(kinds, layers, strict=False)
    ]


def _own(layer: Any, kind: str | None, text: PreTrainedConfig) -> Any:
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return layer
    # Where transformers is not told the kinds of layers, it takes the size of a window before that of chunks.
    chunked = kind == "chunked_attention" or (kind is None and getattr(text, "sliding_window", None) is None)
    return WindowLayer(Window(layer.sliding_window, chunked=chunked))


def has_pages(layer: Any) -> bool:
    """Whether a layer of transformers has full attention, so that ours takes its place."""
    return type(layer) in FULL


def window_of(layer: Any) -> int | None:
    """Tokens that a layer with a window or chunks keeps at most; None for others."""
    return layer.window.size if isinstance(layer, WindowLayer) else None


def is_recurrent(layer: Any) -> bool:
    """Whether a layer keeps a state of all tokens, from which none can be taken back: recurrence or convolution."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, _NoCache)


STATES = ("conv_states", "recurrent_states")
STATE_FLAGS = (
    "is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size",
)  # fmt: skip


def states_of(layer: Any) -> dict[tuple[str, int], Tensor]:
    """Recurrent states and convolutions of a layer, by attribute and number; none where it has no such."""
    if not is_recurrent(layer):
        return {}
    named = ((name, key, state) for name in STATES for key, state in getattr(layer, name).items())
    return {(name, key): state for name, key, state in named if state is not None}


def set_states(layer: Any, states: Mapping[tuple[str, int], Tensor], like: Any) -> None:
    """Give a layer these states, and all else that a layer of the same kind has."""
    for (name, key), state in states.items():
        getattr(layer, name)[key] = state
    for name in STATE_FLAGS:
        setattr(layer, name, dict(getattr(like, name)))
    layer.device, layer.dtype = like.device, like.dtype
