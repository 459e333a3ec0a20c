"""Milestone: tokens that resemble those the model re-read outlive their page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_range
from longthink.kernels.reference import wide_dtype
from longthink.policies.base import PageTable, PolicyInfo, Shape, Step
from longthink.policies.keepers import KeeperPages
from longthink.policies.registry import register


@register("milestone")
@dataclass(frozen=True, kw_only=True)
class Milestone(KeeperPages):
    """Keep the prompt, a window of young pages, and keeper pages for tokens likely to be re-read (our own).

    A token is marked once a distant query, more than `young` / 2 positions away, gave it more than `alpha` of its
    attention: the model re-read it. Old tokens are ranked by how much they resemble the marked ones, by a linear
    discriminant on keys and values fitted to the resident tokens. A result that nothing has read yet is thus kept for
    its kind, which no rule that only counts reads can do.
    Differs from the paper: there is none; `raas` gave the idea of milestones.

    Parameters
    ----------
    alpha
        Share of a query's attention above which it re-reads a token.
    ridge
        Regularisation of the discriminant, as a fraction of the features' mean variance.
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)",
        memory="O(L)",
        keeps="prompt + recent pages + tokens like those that were read again",
        source="longthink",
    )

    alpha: float = 0.5
    ridge: float = 0.003

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0.0, 1.0)
        check_range("ridge", self.ridge, 0.0)

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"weights", "vectors"})

    @override
    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        return {"marked": torch.zeros(shape.B, shape.K, shape.P * shape.T, dtype=torch.int8, device=device)}

    @override
    def observe(self, table: PageTable, step: Step) -> None:
        mark_reread(table, step, self.alpha, self.young // 2)

    @override
    def scores(self, table: PageTable) -> Tensor:
        """How much each token resembles the marked ones, by key plus by value."""
        marked_BKS, resident_BKS = table.state["marked"] > 0, table.resident_BKS
        by_key_BKS, by_value_BKS = (
            discriminant_scores(features_BKSD, marked_BKS, resident_BKS, self.ridge)
            for features_BKSD in (table.keys_BKSD, table.values_BKSD)
        )
        return by_key_BKS + by_value_BKS


def mark_reread(table: PageTable, step: Step, alpha: float, distance: int) -> None:
    """Mark, in the state ``marked``, tokens more than `distance` back that got more than `alpha` of some head."""
    near_B = table.now_B - distance
    far_BKS = table.resident_BKS & (table.position_BKS < near_B[:, None, None])
    table.state["marked"].bitwise_or_((far_BKS & (step.weights_BKGS.amax(2) > alpha)).to(torch.int8))


def discriminant_scores(
    features_BKSD: Tensor, marked_BKS: Tensor, resident_BKS: Tensor, ridge: float
) -> Tensor:
    """How much each token resembles the marked ones and not the rest: a linear discriminant, shape BKS.

    With mean m and covariance C of the resident tokens' features, mean b of the marked ones and D features, the score
    of token x is ``(x - m) . w`` with ``(C + ridge * trace(C) / D * I) w = b - m``: ridge regression of the mark, up
    to a factor. Scores are 0 where nothing is marked and where they are not finite.

    Sums follow the memory order of the features, token-major or feature-major, so that the compiler needs no copy.
    """
    x, tokens, features = features_BKSD.to(wide_dtype(features_BKSD.dtype)), 2, 3
    if features_BKSD.stride(3) != 1:
        x, tokens, features = x.transpose(2, 3), 3, 2
    resident, marked = (
        mask.unsqueeze(features).to(x.dtype) for mask in (resident_BKS, marked_BKS & resident_BKS)
    )
    count = resident.sum(tokens, keepdim=True).clamp(min=1)
    x = (x - (x * resident).sum(tokens, keepdim=True) / count) * resident
    across = x if features == 2 else x.transpose(2, 3)
    covariance_BKDD = across @ across.transpose(2, 3) / count
    difference_BKD = (x * marked).sum(tokens) / marked.sum(tokens).clamp(min=1)
    spread_BK1 = covariance_BKDD.diagonal(dim1=2, dim2=3).mean(-1, keepdim=True)
    # The tiny constant keeps the matrix regular when all tokens are equal.
    ridge_BKD = (ridge * spread_BK1 + 1e-30).expand_as(difference_BKD)
    ridged_BKDD = covariance_BKDD + torch.diag_embed(ridge_BKD)
    direction_BKD1 = torch.linalg.solve_ex(ridged_BKDD, difference_BKD[..., None])[0]
    score_BKS = (x * direction_BKD1[..., 0].unsqueeze(tokens)).sum(features)
    return score_BKS.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
