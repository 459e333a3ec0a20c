"""RaaS: least recently *used* pages give way; the prompt stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_choice, check_flag, check_int, check_range
from longthink.kernels import Learn, Used, bound_scores, page_mass, stamp_used
from longthink.policies.base import PageTable, Policy, Shape, Step
from longthink.policies.dense import Dense
from longthink.policies.registry import register


@register("raas")
@dataclass(frozen=True, kw_only=True)
class RaaS(Policy):
    """Stamp the pages that a query uses with the current step; evict the oldest stamp (arXiv 2502.11147, sec. 3).

    Differs from the paper: scores are reduced over the query heads of a KV head (maximum), without which no
    memory could be freed under grouped-query attention; otherwise nothing with the defaults (version 2).

    Parameters
    ----------
    r
        Share of the resident pages that count as used, best scores first (``used="top_r"``).
    used
        ``top_r`` (version 2 of the paper) or ``alpha`` (version 1: normalised score above a threshold).
    alpha
        The threshold, a share of the attention.
    score
        ``bound``: Quest's upper bound from the page's representatives. ``exact``: the page's share of the softmax
        attention.
    sharing
        One page table per ``kv_head``, or one per ``layer`` (maximum over all heads).
    pin_prompt
        Never evict a page that holds a prompt token.
    dense_layers
        Number of first layers left dense.
    """

    time: ClassVar[str] = "O(L)"
    memory: ClassVar[str] = "O(L)"
    keeps: ClassVar[str] = "prompt + most recently used pages"
    source: ClassVar[str] = "arXiv 2502.11147"
    by_rule: ClassVar[bool] = True

    r: float = 0.5
    used: str = "top_r"
    alpha: float = 1e-4
    score: str = "bound"
    sharing: str = "kv_head"
    pin_prompt: bool = True
    dense_layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("r", self.r, 0.0, 1.0)
        check_choice("used", self.used, ("top_r", "alpha"))
        check_range("alpha", self.alpha, 0.0, 1.0)
        check_choice("score", self.score, ("bound", "exact"))
        check_choice("sharing", self.sharing, ("kv_head", "layer"))
        check_flag("pin_prompt", self.pin_prompt)
        check_int("dense_layers", self.dense_layers, 0)

    @property
    @override
    def pins_prompt(self) -> bool:
        return self.pin_prompt

    @property
    @override
    def uses_representatives(self) -> bool:
        return self.score == "bound"

    @property
    @override
    def uses_weights(self) -> bool:
        return self.score == "exact"

    @property
    @override
    def keeps_maxima(self) -> bool:
        return True

    @property
    @override
    def shares_prompt(self) -> bool:
        return self.pin_prompt

    @override
    def tables(self, kv_heads: int) -> int:
        return 1 if self.sharing == "layer" else kv_heads

    @override
    def for_layer(self, layer_idx: int) -> Policy:
        return Dense(page_size=self.page_size) if layer_idx < self.dense_layers else self

    @override
    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        return {"stamp": torch.zeros(shape.B, shape.K, shape.P, dtype=torch.int32, device=device)}

    @override
    def trim(
        self, position_BQ: Tensor, length_B: Tensor, cap_B: Tensor, mass_BKQ: Tensor | None
    ) -> Tensor | None:
        if self.pin_prompt:
            return None
        pages_B = (length_B + self.page_size - 1).div(self.page_size, rounding_mode="floor")
        first_B1 = ((pages_B - cap_B).clamp(min=0) * self.page_size)[:, None]
        return ((position_BQ >= first_B1) & (position_BQ >= 0))[:, None]

    @override
    def admit(self, table: PageTable, mass_BKS: Tensor | None) -> None:
        last_BKP = table.position_BKS.unflatten(-1, (-1, self.page_size)).amax(-1)
        table.state["stamp"].copy_(last_BKP.clamp(min=0))

    @override
    def priority(self, table: PageTable) -> Tensor:
        return table.state["stamp"]

    @override
    def stamps(self, table: PageTable, score_BKP: Tensor) -> Used:
        r = self.r if self.used == "top_r" else None
        return Used(table.state["stamp"], score_BKP, r, self.alpha)

    @override
    def observe(self, table: PageTable, step: Step) -> None:
        page_BKP = table.page_BKP
        used = self.stamps(table, self._scores(table, step, page_BKP))
        stamp_used(used.stamp_NKP, used.score_NKP, page_BKP, table.now_B, self.page_size, used.r, used.alpha)

    @override
    def learn(self, table: PageTable) -> Learn:
        if self.score == "exact":
            return Learn("mass")
        return Learn("bound_share" if self.used == "alpha" else "bound")

    def _scores(self, table: PageTable, step: Step, page_BKP: Tensor) -> Tensor:
        """Score of each page slot, the maximum over the query heads that share its table."""
        score_BKP = step.score_BKP
        if score_BKP is None and step.weights_BKGS is not None:
            score_BKP = page_mass(step.weights_BKGS, self.page_size).amax(2)
        elif score_BKP is None:
            score_BKGP = bound_scores(step.query_BKGD, table.kmin_BKPD, table.kmax_BKPD)
            if self.used == "alpha":
                empty = (page_BKP < 0)[:, :, None]
                score_BKGP = (score_BKGP * step.scaling).masked_fill(empty, -torch.inf).softmax(-1)
            score_BKP = score_BKGP.amax(2)
        if self.sharing == "kv_head":
            return score_BKP
        score_B1P = score_BKP.amax(1, keepdim=True)
        return score_B1P if step.agree is None else step.agree(score_B1P)
