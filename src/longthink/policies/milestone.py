"""Milestone: tokens that resemble those the model re-read outlive their page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_int, check_range
from longthink.kernels.reference import wide_dtype
from longthink.policies.base import Moves, PageTable, Policy, PolicyInfo, SavesTokens, Shape, Step
from longthink.policies.registry import register


@register("milestone")
@dataclass(frozen=True, kw_only=True)
class Milestone(Policy, SavesTokens):
    """Keep the prompt, a window of young pages, and keeper pages for tokens likely to be re-read (our own).

    A token is marked once a distant query gave it more than `alpha` of its attention: the model re-read it. When the
    oldest young page is evicted, its tokens compete with those in the keeper pages, and the tokens that most resemble
    the marked ones stay, by a linear discriminant on keys and values fitted to the resident tokens. A result that
    nothing has read yet is thus kept for its kind, which no rule that only counts reads can do.
    Differs from the paper: there is none; `raas` gave the idea of milestones.

    Parameters
    ----------
    keep
        Fraction of the decode pages that are keeper pages, after `young` is served.
    young
        Minimum number of tokens in young pages. A query is distant from tokens more than `young` / 2 positions back.
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

    keep: float = 0.8
    young: int = 32
    alpha: float = 0.5
    ridge: float = 0.003

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("keep", self.keep, 0.0, 1.0)
        check_int("young", self.young, 1)
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
    def protected(self, table: PageTable) -> Tensor:
        return super().protected(table) | self._keeper_pages(table)

    @override
    def moves(self, table: PageTable, slot_BK: Tensor, full_BK: Tensor) -> Moves:
        T, pages = self.page_size, torch.arange(table.page_BKP.shape[-1], device=slot_BK.device)
        keeper_BKS = self._keeper_pages(table).repeat_interleave(T, -1)
        going_BKS = (pages == slot_BK[..., None]).repeat_interleave(T, -1)
        kept_BKS = self._best(table, (keeper_BKS | going_BKS) & table.resident_BKS)

        going_BKT = slot_BK[..., None] * T + torch.arange(T, device=slot_BK.device)
        promoted_BKT = kept_BKS.gather(-1, going_BKT) & full_BK[..., None]
        slot_S = torch.arange(kept_BKS.shape[-1], device=slot_BK.device)
        room_BKT = _smallest(slot_S, keeper_BKS & ~kept_BKS, T).clamp(max=len(slot_S) - 1)
        place_BKT = room_BKT.gather(-1, (promoted_BKT.cumsum(-1) - 1).clamp(min=0))
        return Moves(going_BKT, torch.where(promoted_BKT, place_BKT, going_BKT))

    @override
    def observe(self, table: PageTable, step: Step) -> None:
        near_B = table.now_B - self.young // 2
        far_BKS = table.resident_BKS & (table.position_BKS < near_B[:, None, None])
        table.state["marked"].bitwise_or_((far_BKS & (step.weights_BKGS.amax(2) > self.alpha)).to(torch.int8))

    def keepers(self, table: PageTable) -> Tensor:
        """Number of keeper pages of each row, shape B."""
        decode_B = table.cap_B - table.prompt_pages_B
        count_B = (decode_B.double() * self.keep + 0.5 + 1e-9).floor().to(decode_B.dtype)
        young = -(-self.young // self.page_size)
        return torch.minimum(count_B, (decode_B - young).clamp(min=0))

    def _keeper_pages(self, table: PageTable) -> Tensor:
        """The first slots without prompt tokens, bool BKP: decode tokens fill them first; they are never reopened."""
        free_BKP = ~table.prompt_BKP
        return free_BKP & (free_BKP.cumsum(-1) <= self.keepers(table)[:, None, None])

    def _best(self, table: PageTable, candidate_BKS: Tensor) -> Tensor:
        """The best candidates, as many as the keeper pages hold; ties go to the higher position."""
        score_BKS, T = self._scores(table), self.page_size
        room_B = self.keepers(table) * T
        # The keeper pages and one more compete, so at most a page of tokens loses.
        surplus_BK1 = candidate_BKS.sum(-1, keepdim=True) - room_B[:, None, None]
        last_BK1 = _smallest(score_BKS, candidate_BKS, T).gather(-1, (surplus_BK1 - 1).clamp(0, T - 1))
        worse_BKS = candidate_BKS & (score_BKS < last_BK1)
        tied_BKS = candidate_BKS & (score_BKS == last_BK1)
        left_BK1 = surplus_BK1 - worse_BKS.sum(-1, keepdim=True)
        oldest_BKT = _smallest(table.position_BKS, tied_BKS, T)
        oldest_BK1 = oldest_BKT.gather(-1, (left_BK1 - 1).clamp(0, T - 1))
        goes_BKS = worse_BKS | (tied_BKS & (table.position_BKS <= oldest_BK1))
        return candidate_BKS & ~(goes_BKS & (surplus_BK1 > 0))

    def _scores(self, table: PageTable) -> Tensor:
        """How much each token resembles the marked ones, by key plus by value."""
        marked_BKS, resident_BKS = table.state["marked"] > 0, table.resident_BKS
        by_key_BKS, by_value_BKS = (
            discriminant_scores(features_BKSD, marked_BKS, resident_BKS, self.ridge)
            for features_BKSD in (table.keys_BKSD, table.values_BKSD)
        )
        return by_key_BKS + by_value_BKS


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


def _smallest(value_BKS: Tensor, of_BKS: Tensor, count: int) -> Tensor:
    """The `count` smallest of the masked values, ascending and padded with the largest value, shape BKT."""
    most = torch.inf if value_BKS.is_floating_point() else torch.iinfo(value_BKS.dtype).max
    return torch.where(of_BKS, value_BKS, most).topk(count, largest=False).values
