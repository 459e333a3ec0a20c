"""SnapKV at decode: the last queries vote for tokens, and the token with the fewest votes goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_choice
from longthink.policies.base import PageTable, PolicyInfo, Shape, Step
from longthink.policies.registry import register
from longthink.policies.tokens import VotingPolicy, pool_neighbours, record


@register("snapkv")
@dataclass(frozen=True, kw_only=True)
class SnapKV(VotingPolicy):
    """Keep the tokens that the last queries attend to, with their neighbours (arXiv 2404.14469, sec. 4).

    A token's votes are the softmax attention that it received from the last `window` queries, summed over them and
    over the query heads of a KV head, then pooled over neighbouring tokens; the last `window` tokens stay. Votes are
    kept exactly, one number per token and query of the window. Differs from the paper: it compresses a prompt once;
    here the rule is applied in each decode step, and one token leaves before one is written. The queries of the first
    prompt do not vote, the prompt is pinned, the heads of a group vote together, and an average leaves out what is
    beyond the ends, where the authors' code counts zeros: in each step they would mark the token next to the window.

    Parameters
    ----------
    window
        Number of last queries that vote. Their tokens stay, as far as they fill at most half of the free slots.
    kernel
        Number of neighbours, the token itself included, over which votes are pooled; odd.
    pooling
        ``avg`` (the default of the authors' code) or ``max``.
    pin_prompt
        Never evict a prompt token. Otherwise a prompt longer than the budget keeps its last tokens, and all compete.
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)",
        memory="O(L)",
        keeps="prompt + tokens that the last queries attend to + most recent tokens",
        source="arXiv 2404.14469",
    )

    pooling: str = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pooling", self.pooling, ("avg", "max"))

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"weights"})

    @override
    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        return {"votes": torch.zeros(shape.B, shape.K, shape.P * shape.T, self.window, device=device)}

    @override
    def worth(self, table: PageTable) -> Tensor:
        # Votes are summed first: pooling each query would cost `window` times as much.
        votes_BKS1 = table.state["votes"].sum(-1, keepdim=True)
        candidate_BKS, position_BKS = self.candidates(table), table.position_BKS
        return pool_neighbours(votes_BKS1, candidate_BKS, position_BKS, self.kernel, self.pooling)[..., 0]

    @override
    def observe(self, table: PageTable, step: Step) -> None:
        record(table.state["votes"], step.weights_BKGS.sum(2), table.now_B)
