"""Rows of a `PagedCache` that come and go: continuous batching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from transformers import PreTrainedModel

from longthink.cache import FusedStep
from longthink.errors import CacheStateError
from longthink.hf.binding import ModelBinding, outside_inference
from longthink.hf.layer_kinds import set_states, states_of
from longthink.hf.native import NativeLayers
from longthink.policies import Policy


class CacheRows(NativeLayers):
    """The part of a `PagedCache` that takes rows from other caches and gives them to others."""

    binding: ModelBinding
    _fused: Mapping[type[Policy], type[FusedStep]]

    def fresh(self) -> Self:
        """Return an empty cache for the same model, with the same policy, budget and format."""
        model: PreTrainedModel = self.binding.model
        return type(self)(
            model, self.policy, self.budget, kv_dtype=self.kv_dtype, fused=self._fused, kv_bits=self.kv_bits
        )

    @outside_inference
    def adopt(self, row: int, other: Self) -> None:
        """Replace a row by the only row of another cache; with `row` equal to the number of rows, append it.

        Rows may then have seen different numbers of tokens, so the model needs `position_ids`; where layers have a
        window, only steps of longthink decode them.
        """
        if other.settings != self.settings:
            raise CacheStateError("adopt needs a cache of the same policy and budget, in the same format")
        for layer, theirs in zip(self.paged, other.paged, strict=True):
            layer.slots.adopt(row, theirs.slots)
        self._hide_padding()
        other._hide_padding()
        for index, window in self.windows.items():
            window.adopt(row, other.windows[index])
        for mine, layer in zip(self.layers, other.layers, strict=True):
            new = states_of(layer)
            rows = {
                at: torch.cat([old[:row], new[at], old[row + 1 :]]) for at, old in states_of(mine).items()
            }
            if rows:
                set_states(mine, rows, layer)
        self._text.forget()

    @outside_inference
    def row(self, row: int) -> Self:
        """Return a copy of one row, closed: the whole text of the row, without padding."""
        alone = self.fresh()
        length = int(self.paged[0].slots.length_B[row])
        for layer, theirs in zip(alone.paged, self.paged, strict=True):
            layer.slots.take_row(row, theirs.slots)
            layer.columns, layer.is_initialized = length, True
        self._hide_padding()
        for index, window in self.windows.items():
            alone.natives[index].window = window.only(row, length)
        for mine, layer in zip(alone.layers, self.layers, strict=True):
            if states := states_of(layer):
                set_states(mine, {at: old[row : row + 1].clone() for at, old in states.items()}, layer)
        alone._last_state = self._last_state
        alone._text.start_with(length)
        alone.close()
        return alone

    @outside_inference
    def keep_rows(self, rows: list[int]) -> None:
        """Keep only the given rows, and free slots that they do not need."""
        self.batch_select_indices(torch.tensor(rows))
        for layer in self.paged:
            layer.slots.release()
