"""Page tables of identical layers, contiguous in memory, so that one kernel stamps and evicts for all of them.

Only for fused layers; the others evict in `longthink.cache.step`. Shape suffixes: N rows of all layers (layer after
layer), B batch rows, K KV heads (1 where a table serves the whole layer), P page slots, S token slots.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from longthink.accelerators import triton_tables
from longthink.accelerators.layers import EvictionRule, FusedLayer
from longthink.cache import LayerCache
from longthink.cache.store import SlotStore
from longthink.policies import SavesTokens


def group_layers(layers: list[LayerCache]) -> list[LayerGroup]:
    groups: dict[object, list[LayerCache]] = {}
    for layer in layers:
        if layer.is_fused and isinstance(layer.fused, FusedLayer) and layer.fused.grouped:
            keys = layer.store.keys_BKSD
            groups.setdefault((layer.policy, keys.shape, keys.device), []).append(layer)
    return [LayerGroup(alike) for alike in groups.values()]


class LayerGroup:
    """Layers of one policy and shape that have seen the same tokens; their page tables are views of one tensor per
    field.

    A step calls `refresh` first, `choose_slots` before the first layer if a row opens a page, `stamp_pages` after
    the last layer, and `release` at the end, all outside the compiled program, whose inputs must not overlap in
    memory.
    """

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers
        self._policy = layers[0].policy
        self._fused: list[FusedLayer] = [layer.fused for layer in layers]  # type: ignore[misc]
        self._join()

    def refresh(self) -> None:
        """Join the tables again if changes of rows or slots have replaced their tensors.

        Until `release`, the layers leave their page scores to the group. In other steps, such as those of
        ``model.generate``, each layer stamps its own pages.
        """
        held = [layer.store.table.position_BKS for layer in self.layers]
        if any(new is not old for new, old in zip(held, self._views, strict=True)):
            self._join()
        for fused, score_BKP in zip(self._fused, self._scores, strict=True):
            fused.score_BKP = score_BKP

    def _join(self) -> None:
        stores = [layer.store for layer in self.layers]
        rows = len(stores[0].tail_BK)
        joined = [torch.cat(alike) for alike in zip(*(store.tensors()[2:] for store in stores), strict=True)]
        for i, store in enumerate(stores):
            kept = store.tensors()[:2]
            _replace(store, [*kept, *(tensor[i * rows : (i + 1) * rows] for tensor in joined)])
        self._views = [store.table.position_BKS for store in stores]
        for layer in self.layers:
            layer.refresh_compile_marks()
        # Keys and values stay separate: nothing reads those of all layers at once.
        self._whole = copy(stores[0])
        self._whole.table = replace(stores[0].table)
        _replace(self._whole, [tensor[:0] for tensor in stores[0].tensors()[:2]] + joined)
        heads, pages = stores[0].keys_BKSD.shape[1], stores[0].pages
        score_NKP = torch.empty(rows * len(stores), heads, pages, device=self._whole.tail_BK.device)
        self._stamping = self._fused[0].stamp_rule(self._whole.table, score_NKP)
        self._scores = [None] * len(stores) if self._stamping is None else score_NKP.split(rows)

    def choose_slots(self) -> list[Tensor]:
        """Choose the slot for each page that the next token opens; writing the token clears it.

        Returns where each layer evicts a page (BK), for `save_tokens`, if the policy saves tokens.
        """
        full_NK = triton_tables.evict(*self._tables())
        return list(full_NK.chunk(len(self.layers))) if isinstance(self._policy, SavesTokens) else []

    def stamp_pages(self) -> None:
        if self._stamping is not None:
            triton_tables.evict(*self._tables(), self._stamping)

    def release(self) -> None:
        """Return the page scores to the layers, after a step or its failure."""
        for fused in self._fused:
            fused.score_BKP = None

    def _tables(self) -> tuple[SlotStore, SlotStore, EvictionRule]:
        first = self.layers[0].store
        return self._whole, first, self._fused[0].eviction_rule(first.table, self._whole.table)

    def save_tokens(self, full_LBK: list[Tensor]) -> None:
        """Save tokens of the pages about to be overwritten; `full_LBK` comes from `choose_slots`."""
        for layer, full_BK in zip(self.layers, full_LBK, strict=False):
            store, policy = layer.store, layer.policy
            assert isinstance(policy, SavesTokens)
            moves = policy.moves(store.table, store.tail_BK, full_BK)
            if moves is not None:
                (state_BKS,) = store.table.state.values()
                triton_tables.move_tokens(store, moves, state_BKS)


def _replace(store: SlotStore, tensors: list[Tensor]) -> None:
    """Replace `SlotStore.tensors`, in that order."""
    new = iter(tensors)
    store.apply(lambda tensor: next(new))
