"""A cache whose layers with full attention are taken by others, beside transformers' own layers for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from longthink.hf.attention import AttentionLayer, mark
from longthink.hf.layer_kinds import is_recurrent


class _StandIn(CacheLayerMixin):
    """What transformers sees of a layer that attends by itself."""

    is_sliding = False
    is_compileable = True
    supports_early_init = False

    def __init__(self, layer: AttentionLayer, index: int, columns: Callable[[], int] | None) -> None:
        super().__init__()
        self._layer, self._index, self._columns = layer, index, columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer has its own memory."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys, marked, and values."""
        return mark(key_states, value_states, self._layer, self._index), value_states

    def get_seq_length(self) -> int:
        """Columns seen, where the model's queries depend on them; else 0, which does not change from step to step."""
        return 0 if self._columns is None else self._columns()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Size and offset of the mask: the new columns."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        """Unlimited."""
        return -1


class _HybridStandIn(LinearAttentionLayer, _StandIn):
    """The same with a recurrent state, which it shares with the layer that it stands for."""

    def __init__(
        self, layer: AttentionLayer, index: int, columns: Callable[[], int] | None, shared: Any
    ) -> None:
        _StandIn.__init__(self, layer, index, columns)
        LinearAttentionLayer.__init__(self, shared.number_of_states)
        for name in vars(LinearAttentionLayer(shared.number_of_states)):
            setattr(self, name, getattr(shared, name))


def mixed_cache(
    own: Sequence[Any], attending: Mapping[int, AttentionLayer], columns: Callable[[], int] | None = None
) -> Cache:
    """A cache of the layers `own`, except for those by index that attend by themselves; `columns` says how many they
    have seen.
    """
    layers = list(own)
    for index, layer in attending.items():
        place = layer, index, columns
        hybrid = is_recurrent(own[index])
        layers[index] = _HybridStandIn(*place, own[index]) if hybrid else _StandIn(*place)
    return Cache(layers=layers)
