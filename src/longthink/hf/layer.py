"""`PagedLayer`: one layer of a `PagedCache`, behind the interface of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from longthink.cache import LayerCache
from longthink.errors import UnsupportedFeatureError
from longthink.hf.attention import mark
from longthink.hf.binding import ModelBinding, outside_inference


class PagedLayer(CacheLayerMixin):
    """One layer of a `PagedCache`: a `LayerCache` behind the interface of the library.

    Two lengths must not be mixed up: `get_seq_length` counts columns of text (padding included, as everywhere in
    the library), while the slots hold at most the budget. Masks are asked for the new columns only.

    Where a caller has compiled the whole model, the compiler leaves the cache out: it counts tokens on the host, and
    a program would be made anew for each of them.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, slots: LayerCache, binding: ModelBinding) -> None:
        super().__init__()
        self.slots = slots
        self.binding = binding
        self.columns = 0
        self.pending = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: slots are allocated when the prompt's length is known."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys on, marked: they enter the cache in the attention function, beside their queries."""
        self.pending = True
        return mark(key_states, self), value_states

    @torch.compiler.disable
    def check_call(self, module: Any, dropout: float, use_cache: bool | None) -> None:
        """Refuse attention that would be wrong with this layer, before anything is taken in."""
        self.pending = False
        self.binding.check_module(module)
        if dropout:
            raise UnsupportedFeatureError(
                f"attention dropout ({dropout}) in training mode cannot be used with a bounded cache: call "
                "model.eval()"
            )
        if use_cache is False:
            raise UnsupportedFeatureError(
                "use_cache=False cannot be used with a longthink cache: give use_cache=True (it may stand in "
                "model.generation_config or model.config)"
            )
        self.pending = True

    @torch.compiler.disable
    @outside_inference
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float | None
    ) -> Tensor:
        """Take the new tokens in and return their attention output."""
        self.pending = False
        out = self.slots.attend(query, key, value, valid, scaling)
        self.columns += query.shape[2]
        self.is_initialized = True
        return out

    def get_seq_length(self) -> int:
        """Columns of text seen, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Size and offset of the mask: the new columns, behind those seen."""
        return query_length, self.columns

    def get_max_length(self) -> int:
        """No maximum: text may be longer than what is kept."""
        return -1

    def reset(self) -> None:
        """Forget everything and free the slots."""
        self.slots.reset()
        self.columns = 0
        self.pending = self.is_initialized = False

    @outside_inference
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in another order, for beam search."""
        self.slots.select_rows(beam_idx)

    @outside_inference
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        self.slots.select_rows(torch.as_tensor(indices))

    @outside_inference
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.slots.select_rows(torch.arange(len(self.slots.length_B)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what was overwritten cannot come back."""
        if tokens_to_remove:
            raise UnsupportedFeatureError(
                "a bounded page cache cannot be cropped: evicted tokens cannot come back"
            )
