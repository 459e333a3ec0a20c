"""A cache as the model sees it in steps that longthink drives: nothing in it but layers that attend.

The model builds masks and positions as for a text of its own; the real positions are passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longthink.cache import LayerCache
from longthink.hf.attention import AttentionLayer, mark


class CacheView:
    """What is passed to the model as `past_key_values`."""

    is_compileable = True

    def __init__(self, layers: Sequence[AttentionLayer]) -> None:
        self.layers = layers

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return mark(key, self.layers[layer_idx]), value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


class ViewLayer:
    """What the attention function finds on the keys; subclasses attend."""

    def __init__(self, slots: LayerCache) -> None:
        self.slots = slots

    def check_call(self, module: torch.nn.Module, dropout: float, use_cache: bool | None) -> None:
        """Accept: `PagedLayer` has checked the model when it read the prompt."""
