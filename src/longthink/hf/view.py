"""A cache as the model sees it in steps that longthink drives: nothing in it but layers that attend.

The model builds masks and positions as for a text of its own; the real positions are passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from longthink.cache import LayerCache
from longthink.errors import UnsupportedFeatureError
from longthink.hf.attention import AttentionLayer, mark
from longthink.hf.cache import PagedCache
from longthink.hf.layer_kinds import is_recurrent
from longthink.hf.standin import mixed_cache


class CacheView:
    """What is passed to the model as `past_key_values`, where all layers have pages."""

    is_compileable = True

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


def view_of(cache: PagedCache, layers: Sequence[AttentionLayer]) -> CacheView | Cache:
    """What is passed to the model, with these in the place of the layers with pages.

    Raises
    ------
    UnsupportedFeatureError
        If windowed layers hold padding, which no mask would hide.
    """
    if cache.has_windows and cache.paged[0].text.contents()[2] is not None:
        raise UnsupportedFeatureError(
            "rows of different lengths need a mask in layers with a window, which steps of longthink do not give: "
            "use model.generate or longthink.generate, or rows of equal length"
        )
    if cache.natives or any(map(is_recurrent, cache.paged)):
        places = [paged.index for paged in cache.paged]
        return mixed_cache(cache.layers, dict(zip(places, layers, strict=True)))
    return CacheView(layers)


class ViewLayer:
    """What the attention function finds on the keys; subclasses attend."""

    def __init__(self, slots: LayerCache) -> None:
        self.slots = slots
        self.expands = False

    def check_call(self, module: torch.nn.Module, dropout: float, options: Mapping[str, Any]) -> None:
        """Accept: `PagedLayer` has checked the model when it read the prompt."""
