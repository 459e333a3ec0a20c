"""`PagedLayer`: one layer of a `PagedCache`, with the interface of transformers' cache layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from longthink.cache import LayerCache
from longthink.errors import UnsupportedFeatureError, UnsupportedModelError
from longthink.hf.attention import mark
from longthink.hf.binding import ModelBinding, outside_inference
from longthink.hf.columns import Columns
from longthink.hf.refusals import refusal
from longthink.kernels import LogitRule


class PagedLayer(CacheLayerMixin):
    """Adapts a `LayerCache` to `CacheLayerMixin`.

    There are two lengths: `get_seq_length` counts columns of text (including padding, as everywhere in transformers),
    while the slots hold at most the budget. Masks cover the new columns only.

    If the caller compiled the whole model, the cache breaks the graph: it counts tokens on the host, so every token
    would be compiled anew.
    """

    is_sliding = False
    window_size: int | None = None
    supports_early_init = False

    def __init__(self, index: int, slots: LayerCache, binding: ModelBinding, text: Columns) -> None:
        super().__init__()
        self.index = index
        self.slots = slots
        self.text = text
        self.binding = binding
        self.columns = self._new = 0
        self.pending = False
        self.expands = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: slots are allocated once the prompt's length is known."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys, marked: the attention function appends them, as it has the queries too."""
        self.pending, self._new = True, key_states.shape[2]
        self.slots.dense_numbers = sum(
            tensor.shape[1] * tensor.shape[3] for tensor in (key_states, value_states)
        )
        return mark(key_states, value_states, self, self.index), value_states

    @torch.compiler.disable
    def check_call(self, module: Any, dropout: float, options: Mapping[str, Any]) -> None:
        """Raise if the output would be wrong, before anything is appended."""
        if not self.pending:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends twice to the keys of one layer: such attention is not supported"
            )
        self.pending = False
        self.binding.check_module(module)
        if dropout:
            raise UnsupportedFeatureError(
                f"attention dropout ({dropout}) in training mode cannot be used with a bounded cache: call "
                "model.eval()"
            )
        if options.get("output_attentions"):
            raise refusal("output_attentions", True)
        self.binding.check_use_cache(options.get("use_cache"), again=0 < self.columns < self._new)
        self.pending = True

    @torch.compiler.disable
    @outside_inference
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        scaling: float | None,
        rule: LogitRule,
        seen: Tensor | None,
    ) -> Tensor:
        """Append the new tokens and return their attention output."""
        self.pending = False
        lengths = self.text.begin(self.columns, valid, query.shape[2], seen)
        if lengths is not None:
            self.slots.rewind(lengths)
        with torch.no_grad():
            # The cache must not keep the graphs of all texts, and without them gradients would be wrong.
            out = self.slots.attend(query, key, value, valid, scaling, rule)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            out = _NoGradient.apply(out, query)  # type: ignore[no-untyped-call]
        self.columns += query.shape[2]
        self.is_initialized = True
        return out

    @torch.compiler.disable
    @outside_inference
    def attend_again(self, query: Tensor, scaling: float | None, rule: LogitRule) -> Tensor:
        """Attention of a layer that shares these keys and values, for the last of the new tokens."""
        return self.slots.attend_again(query, scaling, rule)

    def get_seq_length(self) -> int:
        """Columns of text seen, including padding."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Size and offset of the mask: the new columns, after those seen."""
        return query_length, self.columns

    def get_max_length(self) -> int:
        """Unlimited: the text may be longer than the budget."""
        return -1

    def reset(self) -> None:
        """Drop the contents and free the slots."""
        self.slots.reset()
        self.text.reset()
        self.columns = 0
        self.pending = self.is_initialized = False

    @outside_inference
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        self._select_rows(torch.as_tensor(beam_idx))

    def _select_rows(self, rows: Tensor) -> None:
        self.text.select_rows(self.slots, rows)
        self.slots.select_rows(rows)


class PagedHybridLayer(LinearAttentionLayer, PagedLayer):
    """A layer that has full attention beside a recurrent state, which stays transformers' own."""

    is_compileable = False

    def __init__(
        self, index: int, slots: LayerCache, binding: ModelBinding, text: Columns, number_of_states: int
    ) -> None:
        PagedLayer.__init__(self, index, slots, binding, text)
        LinearAttentionLayer.__init__(self, number_of_states)

    def reset(self) -> None:
        """Drop the contents, free the slots and the states."""
        PagedLayer.reset(self)
        LinearAttentionLayer.__init__(self, self.number_of_states)

    def _select_rows(self, rows: Tensor) -> None:
        PagedLayer._select_rows(self, rows)
        LinearAttentionCacheLayerMixin.reorder_cache(self, rows)

    reorder_cache = PagedLayer.reorder_cache


class _NoGradient(torch.autograd.Function):
    """Refuses the backward pass, through whatever is computed from the output."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UnsupportedFeatureError(
            "gradients cannot be computed through a longthink cache: train with use_cache=False and no cache of ours"
        )
