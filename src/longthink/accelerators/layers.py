"""Fused decode steps, one class per policy class: the parameters with which the kernels reproduce a policy.

The policy's own file is the definition; tests compare the two. Shape suffixes: N rows of all layers (layer after
layer), B batch rows, K KV heads, P page slots, S token slots.
"""

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
    pinned_B: Tensor  # number of first tokens whose pages are protected
    recent_B: Tensor | None = None  # number of most recent pages that are protected
    kept_B: Tensor | None = None  # number of slots after the prompt's that are protected
    worth_NKP: Tensor | None = None  # the least is evicted, a tie evicting the lowest page; None: the oldest


class StampRule(NamedTuple):
    """Parameters of the stamping rule: the best fraction `r` of the pages, or if None, scores above `alpha`."""

    stamp_NKP: Tensor
    score_NKP: Tensor
    r: float | None
    alpha: float = 0.0


class FusedLayer:
    """The fused decode step of a layer, for a policy of exactly the class in `longthink.accelerators.table`."""

    grouped: ClassVar[bool] = True
    """Whether one kernel can evict and stamp for all layers of the policy: see `LayerGroup`."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.score_BKP: Tensor | None = None
        """Destination of this step's page scores, if a group stamps for all layers."""

    def serves(self, store: SlotStore) -> bool:
        same_dim = store.keys_BKSD.shape[-1] == store.values_BKSD.shape[-1]
        return accelerators.available(store.keys_BKSD) and store.rule.is_plain and same_dim

    def step(self, store: SlotStore, new: QKV, scaling: float) -> Tensor:
        """Equivalent of `longthink.cache.step.decode_step`. Returns BHD."""
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
        del table
        return attention.NOTHING

    def use_scores(self, table: PageTable, score_BKP: Tensor) -> None:
        """Update the policy's state from the page scores of a step, without a group."""

    def eviction_rule(self, table: PageTable, whole: PageTable) -> EvictionRule:
        """Eviction rule of a group; `table` is the first layer's, for what all share, `whole` the joined one."""
        return EvictionRule(table.prompt_B if self.policy.pins_prompt() else torch.zeros_like(table.prompt_B))

    def stamp_rule(self, table: PageTable, score_NKP: Tensor) -> StampRule | None:
        """Stamping rule of a group's joined tables; None if page scores do not stamp."""
        del table, score_NKP
        return None


class FusedRecency(FusedLayer):
    """Evict the oldest page."""


class FusedRaaS(FusedLayer):
    """Evict the oldest stamp; stamp pages by their scores."""

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
    """Evict the oldest young page; the kernel writes marks."""

    @override
    def side_output(self, table: PageTable) -> SideOutput:
        return attention.marks(table.state["marked"], self.policy.alpha, self.policy.young // 2)

    @override
    def eviction_rule(self, table: PageTable, whole: PageTable) -> EvictionRule:
        return super().eviction_rule(table, whole)._replace(kept_B=self.policy.keepers(table))


class FusedH2O(FusedLayer):
    """Evict the least attended token outside the window; the kernel accumulates attention."""

    @override
    def side_output(self, table: PageTable) -> SideOutput:
        return attention.sums(table.state["mass"])

    @override
    def eviction_rule(self, table: PageTable, whole: PageTable) -> EvictionRule:
        recent_B = self.policy.recent_pages(table)
        return super().eviction_rule(table, whole)._replace(recent_B=recent_B, worth_NKP=whole.state["mass"])


class FusedQuest(FusedLayer):
    """Evict nothing; every program selects the pages with the highest bounds."""

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
