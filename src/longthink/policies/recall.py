"""Recall: what was attended to lately, and what looks like tokens that the model re-reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_int, check_range
from longthink.kernels.reference import wide_dtype
from longthink.policies.base import PageTable, PolicyInfo, Shape, Step
from longthink.policies.keepers import KeeperPages
from longthink.policies.milestone import mark_reread
from longthink.policies.registry import register

TRUST = (0.05, 0.2)
"""Leave-one-out R^2 of the likeness up to which it counts for nothing, and from which it counts in full."""


@register("recall")
@dataclass(frozen=True, kw_only=True)
class Recall(KeeperPages):
    """Keep the prompt, recent tokens, and old ones by recent attention and by likeness to re-read tokens (our own).

    Old tokens are ranked by the sum of three terms:

    - attention received, as a mean over the heads of the group, with an exponential memory of `memory` steps, times
      the norm of the token's value over the mean norm: what the token has added to the output lately;
    - `head_start` for the latest `window` of the decode tokens;
    - likeness: the fit of a ridge regression, on keys and on values, of the marks of re-read tokens (`milestone`),
      scaled to 1 for the marked ones, times the trust that its leave-one-out R^2 deserves. In heads that re-read
      single tokens it keeps results that nothing has read yet; in most others it is 0.

    Differs from the paper: there is none; attention with forgetting stands between `h2o` and `tova`.

    Parameters
    ----------
    memory
        Steps after which attention counts 1 / e.
    window
        Fraction of the decode tokens with the head start.
    head_start
        What it is worth, as a share of attention.
    alpha
        Share of a query's attention above which it re-reads a token more than `young` / 2 positions back.
    ridge
        Regularisation of the regression, as a fraction of the features' mean variance.
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)",
        memory="O(L)",
        keeps="prompt + recent tokens + tokens attended to lately or like re-read ones",
        source="longthink",
    )

    page_size: int = 8
    memory: int = 100
    window: float = 0.5
    head_start: float = 0.1
    alpha: float = 0.8
    ridge: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("memory", self.memory, 1)
        check_range("window", self.window, 0.0, 1.0)
        check_range("head_start", self.head_start, 0.0)
        check_range("alpha", self.alpha, 0.0, 1.0)
        check_range("ridge", self.ridge, 0.0)

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"weights", "vectors"})

    @override
    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        slots = (shape.B, shape.K, shape.P * shape.T)
        return {
            "attention": torch.zeros(slots, device=device),
            "marked": torch.zeros(slots, dtype=torch.int8, device=device),
        }

    @override
    def observe(self, table: PageTable, step: Step) -> None:
        mark_reread(table, step, self.alpha, self.young // 2)
        new_BKS = step.weights_BKGS.mean(2) / self.memory
        table.state["attention"].mul_(self.decay).add_(new_BKS)

    @property
    def decay(self) -> float:
        """What a step leaves of the attention that is remembered."""
        return 1 - 1 / self.memory

    @override
    def scores(self, table: PageTable) -> Tensor:
        recent_BKS = table.state["attention"] * self._relative_norms(table)
        decode_B = self.decode_pages(table) * self.page_size
        started_B = table.now_B - (decode_B.double() * self.window + 1e-9).long()
        head_start_BKS = self.head_start * (table.position_BKS >= started_B[:, None, None])
        return (recent_BKS + head_start_BKS + self._likeness(table)).nan_to_num(
            nan=0.0, posinf=0.0, neginf=0.0
        )

    def _relative_norms(self, table: PageTable) -> Tensor:
        resident_BKS, values_BKSD = table.resident_BKS, table.values_BKSD
        norm_BKS = values_BKSD.to(wide_dtype(values_BKSD.dtype)).square().sum(-1).sqrt() * resident_BKS
        mean_BK1 = norm_BKS.sum(-1, keepdim=True) / resident_BKS.sum(-1, keepdim=True).clamp(min=1)
        return norm_BKS / mean_BK1.clamp(min=1e-9)

    def _likeness(self, table: PageTable) -> Tensor:
        resident_BKS = table.resident_BKS
        marked_BKS = (table.state["marked"] > 0) & resident_BKS
        key_fit, key_r2 = leave_one_out_ridge(table.keys_BKSD, marked_BKS, resident_BKS, self.ridge)
        value_fit, value_r2 = leave_one_out_ridge(table.values_BKSD, marked_BKS, resident_BKS, self.ridge)
        doubt, trust = TRUST
        trust_BK1 = ((torch.maximum(key_r2, value_r2) - doubt) / (trust - doubt)).clamp(0, 1)
        count_BK1 = marked_BKS.sum(-1, keepdim=True)
        fit_BKS = key_fit + value_fit
        of_marked_BK1 = (fit_BKS * marked_BKS).sum(-1, keepdim=True) / count_BK1.clamp(min=1)
        # One example has nothing to be left out for.
        return (count_BK1 > 1) * trust_BK1 * (fit_BKS / of_marked_BK1.clamp(min=1e-9)).clamp(-1, 1.5)


def leave_one_out_ridge(
    features_BKSD: Tensor, marked_BKS: Tensor, resident_BKS: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Ridge regression of the mark on the features of the resident tokens.

    With n tokens, centred features X and marks y, C = X'X / n and A = C + ridge * trace(C) / D * I, the fit is
    ``X A^-1 X'y / n``, and leaving token i out changes its prediction to ``(fit_i - h_i y_i) / (1 - h_i)`` with the
    leverage ``h_i = (x_i' A^-1 x_i + 1) / n`` (the identity of PRESS).

    Returns
    -------
    tuple of Tensor
        The fit without the mean, BKS, and the R^2 of the predictions of tokens left out, BK1.
    """
    x = features_BKSD.to(wide_dtype(features_BKSD.dtype))
    resident, marked = resident_BKS.to(x.dtype), marked_BKS.to(x.dtype)
    n = resident.sum(-1, keepdim=True).clamp(min=2)
    x = (x - (x * resident[..., None]).sum(2, keepdim=True) / n[..., None]) * resident[..., None]
    y = (marked - marked.sum(-1, keepdim=True) / n) * resident
    across = x.transpose(2, 3)
    covariance = across @ x / n[..., None]
    spread_BK1 = covariance.diagonal(dim1=2, dim2=3).mean(-1, keepdim=True)
    # The tiny constant keeps the matrix regular when all tokens are equal.
    added = torch.diag_embed((ridge * spread_BK1 + 1e-30).expand(*spread_BK1.shape[:2], x.shape[3]))
    target = (x * y[..., None]).sum(2) / n
    # One product with the inverse is several times faster than solving for every token.
    projected = x @ torch.linalg.inv_ex(covariance + added)[0]
    fit = (projected * target[:, :, None]).sum(-1)
    leverage = (((x * projected).sum(-1) + 1) / n).clamp(max=0.95)
    error = (y - (fit - leverage * y) / (1 - leverage)) * resident
    spread = (y * n / (n - 1)).square().sum(-1, keepdim=True)
    r2 = 1 - error.square().sum(-1, keepdim=True) / spread.clamp(min=1e-9)
    return fit, r2.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
