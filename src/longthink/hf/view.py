"""A cache as the model sees it in steps that longthink drives: nothing in it but layers that attend.

The model builds masks and positions as for a text of its own; the real positions are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from longthink.cache.window import Window
from longthink.hf.attention import AttentionLayer, mark
from longthink.hf.cache import PagedCache
from longthink.hf.standin import mixed_cache
from longthink.hf.support import scales_by_columns
from longthink.kernels import LogitRule


class CacheView:
    """What is passed to the model as `past_key_values`, where all layers have pages."""

    is_compileable = is_initialized = True

    def __init__(self, layers: Sequence[AttentionLayer]) -> None:
        self.layers = layers

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return mark(key, value, self.layers[layer_idx], layer_idx), value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


class ViewLayer:
    """What the attention function finds on the keys; subclasses attend."""

    window_size: int | None = None

    def __init__(self, slots: Any) -> None:
        self.slots = slots
        self.expands = False

    def check_call(self, module: torch.nn.Module, dropout: float, options: Mapping[str, Any]) -> None:
        """Accept: `PagedLayer` has checked the model when it read the prompt."""

    def attend_again(self, query: Tensor, scaling: float | None, rule: LogitRule) -> Tensor:
        """Attention of a layer that shares these keys and values."""
        return self.slots.attend_again(query, scaling, rule)


class ViewWindow(ViewLayer):
    """Likewise on the keys of a layer with a window, which needs no mask of the library."""

    slots: Window

    def __init__(self, window: Window) -> None:
        super().__init__(window)
        self.window_size = window.size

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float | None,
        rule: LogitRule, seen: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Append new tokens for every row and return their attention output, B x H x Q x D."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return self.slots.attend(query, key, value, scaling, rule)


def view_of(
    cache: PagedCache,
    layers: Sequence[AttentionLayer],
    view_window: Callable[[Window], AttentionLayer] = ViewWindow,
) -> CacheView | Cache:
    """What is passed to the model, with these in the place of the layers with pages, and views of the windows."""
    if not cache.is_mixed:
        return CacheView(layers)
    attending = dict(zip((paged.index for paged in cache.paged), layers, strict=True))
    attending |= {i: view_window(window) for i, window in cache.windows.items()}
    columns = (lambda: cache.columns) if scales_by_columns(cache.binding.model.config) else None
    return mixed_cache(cache.layers, attending, columns)
