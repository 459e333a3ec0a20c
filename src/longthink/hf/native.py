"""Layers that are bounded by nature in a cache of ours: windows and chunks, and transformers' own layers for
convolutions and recurrent states. Only layers with full attention get pages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from longthink.hf.binding import outside_inference
from longthink.hf.columns import Columns
from longthink.hf.contents import CacheContents
from longthink.hf.layer_kinds import is_recurrent


class NativeLayers(CacheContents, Cache):
    """The part of a `PagedCache` that concerns `natives`, the layers without pages."""

    _text: Columns
    _last_state = -1
    """The recurrent layer that has changed last."""

    @property
    def is_mixed(self) -> bool:
        """Whether there is more than layers with pages and nothing else."""
        return bool(self.natives) or any(map(is_recurrent, self.layers))

    def _reset_natives(self) -> None:
        """Replace states by empty ones: transformers' own reset would keep their memory."""
        for index, layer in self.natives.items():
            if isinstance(layer, LinearAttentionLayer):
                self.natives[index] = self.layers[index] = type(layer)(layer.number_of_states)
        self._last_state = -1

    def _natives_complete(self) -> bool:
        """Whether these layers have read what the others have."""
        if any(window.aligned and window.columns != self.columns for window in self.windows.values()):
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

    # Windows ------------------------------------------------------------------------------------------------

    def _begin_windows(self, tokens: int) -> None:
        """Make room for tokens that the windows attend to by themselves."""
        self._hide_padding()
        for window in self.windows.values():
            window.reserve(window.columns + tokens)

    def _hide_padding(self) -> None:
        """Tell windows which columns are padding, if they have read some since; as a mask does in the library."""
        windows = [window for window in self.windows.values() if not window.padding_is_known]
        real_BN = self._text.contents()[2] if windows else None
        for window in windows:
            window.hide(real_BN)
