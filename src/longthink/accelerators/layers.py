"""Fused decode steps, one class for each policy class that has one. What a policy does is defined in its own file;
here stands how the kernels are told to do the same, and tests compare the two.

Shape suffixes: N rows of all layers (layer after layer), B batch rows, K KV heads, P page slots, S token slots.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from longthink import accelerators
from longthink.accelerators import attention
from longthink.cache.step import QKV
from longthink.cache.store import SlotStore
from longthink.kernels.triton_decode import SideOutput
from longthink.policies import PageTable


class EvictionRule(NamedTuple):
    """Which page is evicted.

    Attributes
    ----------
    pinned_B
        So many tokens at the start stay, in whole pages.
    recent_B
        So many pages before the new token's stay; None for none.
    kept_B
        So many slots behind the prompt's stay; None for none.
    worth_NKP
        The least leaves, a tie going to the lowest page; None for the page number itself (the oldest).
    """

    pinned_B: Tensor
    recent_B: Tensor | None = None
    kept_B: Tensor | None = None
    worth_NKP: Tensor | None = None


class StampRule(NamedTuple):
    """How pages are stamped: a share `r` of the best scores, or where `r` is None all scores above `alpha`."""

    stamp_NKP: Tensor
    score_NKP: Tensor
    r: float | None
    alpha: float = 0.0


class FusedLayer:
    """The decode step of a layer by kernels.

    Parameters
    ----------
    policy
        A policy of exactly the class that the kernels are made for.
    """

    grouped: ClassVar[bool] = True
    """Whether one kernel can evict, and stamp, for all layers of the policy: see `LayerGroup`."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.score_BKP: Tensor | None = None
        """Where the scores of this step's pages go, if a group learns from them for all layers."""

    def serves(self, store: SlotStore) -> bool:
        """Whether the kernels run where the slots are."""
        return accelerators.available(store.keys_BKSD)

    def step(self, store: SlotStore, new: QKV, scaling: float) -> Tensor:
        """Append, read and learn as `longthink.cache.step.decode_step` does for the policy. Returns BHD."""
        query_BHD, key_BKD, value_BKD = new
        query_BKGD = query_BHD.unflatten(1, (key_BKD.shape[1], -1))
        out_BKGD, score_BKP = attention.step_attention(
            query_BKGD, key_BKD, value_BKD, attention.slots_of(store), scaling, self.side_output(store.table),
            self.score_BKP,
        )  # fmt: skip
        if score_BKP is not None and self.score_BKP is None:
            self.use_scores(store.table, score_BKP)
        store.table.now_B.add_(1)
        return out_BKGD.flatten(1, 2)

    def side_output(self, table: PageTable) -> SideOutput:
        """What the kernel writes beside the output."""
        del table
        return attention.NOTHING

    def use_scores(self, table: PageTable, score_BKP: Tensor) -> None:
        """SideOutput from the scores of a step's pages, without a group."""

    def eviction_rule(self, table: PageTable, whole: PageTable) -> EvictionRule:
        """Which page of a group's tables is evicted.

        Parameters
        ----------
        table, whole
            The first layer's, where what is the same in all layers is read, and that of all layers.
        """
        return EvictionRule(table.prompt_B if self.policy.pins_prompt() else torch.zeros_like(table.prompt_B))

    def stamp_rule(self, table: PageTable, score_NKP: Tensor) -> StampRule | None:
        """How the scores of a step stamp the pages of a group's table; None if nothing is learned from scores."""
        del table, score_NKP
        return None


class FusedRecency(FusedLayer):
    """The oldest page leaves."""


class FusedRaaS(FusedLayer):
    """The oldest stamp leaves; pages are stamped by their scores."""

    @override
    def side_output(self, table: PageTable) -> SideOutput:
        if self.policy.score == "exact":
            return attention.MASS
        return attention.BOUND_SHARE if self.policy.used == "alpha" else attention.BOUND

    @override
    def use_scores(self, table: PageTable, score_BKP: Tensor) -> None:
        shared = self.policy.sharing == "layer"
        self.policy.stamp(table, score_BKP.amax(1, keepdim=True) if shared else score_BKP)

    @override
    def eviction_rule(self, table: PageTable, whole: PageTable) -> EvictionRule:
        return super().eviction_rule(table, whole)._replace(worth_NKP=whole.state["stamp"])

    @override
    def stamp_rule(self, table: PageTable, score_NKP: Tensor) -> StampRule:
        r = self.policy.r if self.policy.used == "top_r" else None
        return StampRule(table.state["stamp"], score_NKP, r, self.policy.alpha)


class FusedMilestone(FusedLayer):
    """The oldest young page leaves; marks are written by the kernel."""

    @override
    def side_output(self, table: PageTable) -> SideOutput:
        return attention.marks(table.state["marked"], self.policy.alpha, self.policy.young // 2)

    @override
    def eviction_rule(self, table: PageTable, whole: PageTable) -> EvictionRule:
        return super().eviction_rule(table, whole)._replace(kept_B=self.policy.keepers(table))


class FusedH2O(FusedLayer):
    """The least attended token leaves, unless it is recent; attention is added up by the kernel."""

    @override
    def side_output(self, table: PageTable) -> SideOutput:
        return attention.sums(table.state["mass"])

    @override
    def eviction_rule(self, table: PageTable, whole: PageTable) -> EvictionRule:
        recent_B = self.policy.recent_pages(table)
        return super().eviction_rule(table, whole)._replace(recent_B=recent_B, worth_NKP=whole.state["mass"])


class FusedQuest(FusedLayer):
    """Nothing leaves; every program finds the pages with the highest bounds for itself."""

    grouped = False

    @override
    def step(self, store: SlotStore, new: QKV, scaling: float) -> Tensor:
        query_BHD, key_BKD, value_BKD = new
        query_BKGD = query_BHD.unflatten(1, (key_BKD.shape[1], -1))
        out_BKGD = attention.select_attention(
            query_BKGD, key_BKD, value_BKD, attention.slots_of(store), store.table.cap_B, scaling
        )
        store.table.now_B.add_(1)
        return out_BKGD.flatten(1, 2)
