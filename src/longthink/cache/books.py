"""Page tables of alike layers side by side in memory, so that one kernel stamps and evicts for all of them.

Only where there is such a kernel, on a GPU: elsewhere each layer keeps its own books, in `step`.

Shape suffixes: N rows of all layers (layer after layer), B batch rows, K KV heads (1 where a table serves the whole
layer), P page slots, S token slots.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from longthink import kernels
from longthink.cache.layer import LayerCache
from longthink.cache.step import reads_all
from longthink.cache.store import SlotStore
from longthink.kernels import Turn
from longthink.policies import Policy


def group_books(layers: list[LayerCache]) -> list[Books]:
    """Books of the layers of which a kernel can keep them, those of one policy and shape together."""
    groups: dict[object, list[LayerCache]] = {}
    for layer in layers:
        policy, keys = layer.policy, layer.store.keys_BKSD
        if policy.by_rule and reads_all(policy) and kernels.fuses_append(keys):
            groups.setdefault((policy, keys.shape, keys.device), []).append(layer)
    return [Books(alike) for alike in groups.values()]


class Books:
    """The page tables of layers of one policy, made views of one tensor for each field.

    In a step, `refresh` comes first, `name_slots` before the first layer if a row opens a page, and `stamp` behind
    the last layer. They are no part of what is compiled: a program takes no tensors that lie in one another.

    Parameters
    ----------
    layers
        Layers of the same policy and shape that have read the same tokens.
    """

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers
        self._policy = layers[0].policy
        self.scores: list[Tensor] | list[None] = [None] * len(layers)
        """Where the scores of each layer's step go, BKP; None if nothing is learned from them for all layers."""
        self._views: list[Tensor] = []
        self.refresh()

    def refresh(self) -> None:
        """Join the tables, unless they are joined: rows and slots that come and go bring new tensors."""
        held = [layer.store.table.position_BKS for layer in self.layers]
        if not self._views or any(new is not old for new, old in zip(held, self._views, strict=True)):
            self._join()

    def _join(self) -> None:
        stores = [layer.store for layer in self.layers]
        rows = len(stores[0].tail_BK)
        joined = [torch.cat(alike) for alike in zip(*(store.tensors()[2:] for store in stores), strict=True)]
        for i, store in enumerate(stores):
            kept = store.tensors()[:2]
            _replace(store, [*kept, *(tensor[i * rows : (i + 1) * rows] for tensor in joined)])
        self._views = [store.table.position_BKS for store in stores]
        for layer in self.layers:
            layer.renewed()
        # Keys and values of a layer stay where they are: nothing reads those of all layers at once.
        self._whole = copy(stores[0])
        self._whole.table = replace(stores[0].table)
        _replace(self._whole, [tensor[:0] for tensor in stores[0].tensors()[:2]] + joined)
        heads, pages = stores[0].keys_BKSD.shape[1], stores[0].pages
        score_NKP = torch.empty(rows * len(stores), heads, pages, device=self._whole.tail_BK.device)
        stamps = self._policy.stamps(self._whole.table, score_NKP) is not None
        self._score_NKP = score_NKP if stamps else None
        if stamps:
            self.scores = list(score_NKP.split(rows))

    def name_slots(self) -> list[Tensor]:
        """Name the slot of the next token's page, where it opens one; it is emptied as the token is written.

        Returns
        -------
        list of Tensor
            For each layer, if its policy saves tokens: where a page gives way, BK, for `save_tokens`.
        """
        full_NK = kernels.bookkeep(self._turn())
        saves = type(self._policy).moves is not Policy.moves
        return list(full_NK.chunk(len(self.layers))) if saves else []

    def stamp(self) -> None:
        """Learn from the scores of a step of all layers, in one go."""
        if self._score_NKP is not None:
            kernels.bookkeep(self._turn(), self._policy.stamps(self._whole.table, self._score_NKP))

    def _turn(self) -> Turn:
        whole, table, policy = self._whole.table, self.layers[0].store.table, self._policy
        ranked = type(policy).priority is not Policy.priority
        return Turn(
            whole.position_BKS,
            self._whole.tail_BK,
            table.now_B,
            table.prompt_B,
            table.cap_B,
            table.page_size,
            policy.rule(table),
            policy.priority(whole) if ranked else None,
        )


def _replace(store: SlotStore, tensors: list[Tensor]) -> None:
    """Put these in the place of `SlotStore.tensors`, in that order."""
    new = iter(tensors)
    store.apply(lambda tensor: next(new))
