"""Layers that are bounded by nature - windows, chunks, convolutions, recurrent states - in a cache of ours.

They keep transformers' own cache layers, and behave as they do there; only layers with full attention get pages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from longthink.errors import CacheStateError
from longthink.hf.binding import outside_inference
from longthink.hf.contents import CacheContents
from longthink.hf.layer_kinds import is_recurrent, window_of


class NativeLayers(CacheContents, Cache):
    """The part of a `PagedCache` that concerns `natives`: what they hold is transformers' business."""

    _last_state = -1
    """The recurrent layer that has changed last."""

    @property
    def has_windows(self) -> bool:
        """Whether a layer keeps columns of text, padding included, as a window."""
        return any(window_of(layer) is not None for layer in self.natives.values())

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer has read all tokens into a state."""
        return any(is_recurrent(layer) for layer in self.layers)

    def _reset_natives(self) -> None:
        """Replace them by empty ones: transformers' own reset would keep their memory."""
        for index, layer in self.natives.items():
            fresh: dict[str, Any] = {}
            if window_of(layer) is not None:
                fresh["sliding_window"] = window_of(layer)
            if isinstance(layer, LinearAttentionLayer):
                fresh["number_of_states"] = layer.number_of_states
            self.natives[index] = self.layers[index] = type(layer)(**fresh)
        self._last_state = -1

    def _natives_complete(self) -> bool:
        """Whether these layers have read what the others have."""
        windows = [layer for layer in self.natives.values() if window_of(layer) is not None]
        if any(layer.cumulative_length != self.columns for layer in windows):
            return False
        last = max((i for i, layer in enumerate(self.layers) if is_recurrent(layer)), default=-1)
        return self._last_state == (last if self.columns else -1)

    def reset(self) -> None:
        """Drop the contents of all layers."""
        super().reset()
        self._reset_natives()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes the old row ``indices[i]``, in all layers."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, in all layers."""
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def _enter(self, new: Tensor, layer_idx: int) -> None:
        """Check the rows of a pass in its first layer, before any layer has changed."""
        raise NotImplementedError

    @outside_inference
    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Update the convolution of a layer, as transformers does."""
        self._enter(conv_states, layer_idx)
        self._last_state = layer_idx
        states: Tensor = super().update_conv_state(conv_states, layer_idx, *args, **kwargs)
        return states

    @outside_inference
    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Update the recurrent state of a layer, as transformers does."""
        self._enter(recurrent_states, layer_idx)
        self._last_state = layer_idx
        states: Tensor = super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        return states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """State of a convolution, which a step over one token changes in place (from transformers 5.20 on)."""
        self._last_state = layer_idx
        state: Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state

    def _adopt_native_rows(self, row: int, other: NativeLayers) -> None:
        """Replace a row of every recurrent layer by the only row of another cache, or append it."""
        for index, layer in enumerate(self.layers):
            if is_recurrent(layer):
                theirs = other.layers[index]
                for name in ("conv_states", "recurrent_states"):
                    mine, new = getattr(layer, name), getattr(theirs, name)
                    for key, state in new.items():
                        if state is not None:
                            mine[key] = torch.cat([mine[key][:row], state, mine[key][row + 1 :]])

    def _take_native_row(self, row: int, other: NativeLayers) -> None:
        """Become a copy of one row of every recurrent layer of another cache."""
        for index, layer in enumerate(self.layers):
            if is_recurrent(layer):
                theirs = other.layers[index]
                for name in ("conv_states", "recurrent_states"):
                    states = getattr(theirs, name)
                    mine = {
                        key: None if state is None else state[row : row + 1].clone()
                        for key, state in states.items()
                    }
                    setattr(layer, name, mine)
                for name in (
                    "is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state",
                    "conv_kernel_size",
                ):  # fmt: skip
                    setattr(layer, name, dict(getattr(theirs, name)))
                layer.device, layer.dtype = theirs.device, theirs.dtype
        self._last_state = other._last_state

    def _check_rows_alike(self, what: str) -> None:
        """Raise where rows of different texts would have to share the columns of a window."""
        if self.has_windows:
            raise CacheStateError(
                f"{what} needs a cache without windowed layers: transformers keeps their columns in step for all rows"
            )
