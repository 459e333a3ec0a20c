"""`WindowLayer`: a layer with a window or chunks, with the interface of transformers' cache layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from longthink.cache.window import Window
from longthink.errors import CacheStateError


class WindowLayer(CacheLayerMixin):
    """Adapts a `Window` to `CacheLayerMixin`, as transformers' own layer of this kind: masks are its own as well."""

    is_sliding = True
    supports_early_init = False

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: slots are allocated as the text grows."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new columns, and return the keys and values that their queries may read."""
        self._check_aligned()
        self.is_initialized = True
        return self.window.update(key_states, value_states)

    def get_seq_length(self) -> int:
        """Columns of text seen, including padding."""
        return self.window.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Size and offset of the mask: the columns of the window that are read, and the new ones."""
        self._check_aligned()
        offset = max(0, self.window.columns - self.window.size + 1)
        return self.window.columns - offset + query_length, offset

    def _check_aligned(self) -> None:
        if not self.window.aligned:
            raise CacheStateError(
                "the rows of this cache are of different texts, and a mask of transformers knows one length for all "
                "in layers with a window: decode them with longthink.hf.DecodeStep, or take one with cache.row"
            )

    def get_max_length(self) -> int:
        """Columns that a query reads at most."""
        return self.window.size

    def reset(self) -> None:
        """Drop the contents and free the slots."""
        self.window.reset()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        self.window.select_rows(beam_idx)
