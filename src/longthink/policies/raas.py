"""RaaS: pin the prompt and evict the least recently *used* page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_choice, check_flag, check_int, check_range
from longthink.kernels import bound_scores, page_mass, top_fraction
from longthink.policies.base import (
    PageTable,
    Policy,
    PolicyInfo,
    Shape,
    SharesTable,
    Step,
    TrimsPrompt,
    latest_pages,
)
from longthink.policies.dense import Dense
from longthink.policies.registry import register


@register("raas")
@dataclass(frozen=True, kw_only=True)
class RaaS(Policy, TrimsPrompt, SharesTable):
    """Stamp the pages that a query uses with the current step; evict the oldest stamp (arXiv 2502.11147, sec. 3).

    Differs from the paper: scores are reduced to the maximum over the query heads of a KV head; per-query-head scores
    would free no memory under grouped-query attention. The defaults are otherwise those of version 2.

    Parameters
    ----------
    r
        Fraction of the resident pages that count as used, best scores first (``used="top_r"``).
    used
        ``top_r`` (version 2 of the paper) or ``alpha`` (version 1: normalised score above `alpha`).
    alpha
        Threshold on the normalised score.
    score
        ``bound``: Quest's upper bound from the page's key bounds. ``exact``: the page's share of the attention.
    sharing
        One page table per ``kv_head``, or one per ``layer`` (maximum over all heads).
    pin_prompt
        Never evict a page that holds a prompt token.
    dense_layers
        Number of leading layers that stay dense.
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)", memory="O(L)", keeps="prompt + most recently used pages", source="arXiv 2502.11147"
    )

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

    @override
    def pins_prompt(self) -> bool:
        return self.pin_prompt

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"key_bounds" if self.score == "bound" else "weights"})

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
        return None if self.pin_prompt else latest_pages(position_BQ, length_B, cap_B, self.page_size)

    @override
    def admit(self, table: PageTable, mass_BKS: Tensor | None) -> None:
        last_BKP = table.position_BKS.unflatten(-1, (-1, self.page_size)).amax(-1)
        table.state["stamp"].copy_(last_BKP.clamp(min=0))

    @override
    def worth(self, table: PageTable) -> Tensor:
        return table.state["stamp"]

    @override
    def observe(self, table: PageTable, step: Step) -> None:
        if self.score == "exact":
            score_BKGP = page_mass(step.weights_BKGS, self.page_size)
        else:
            score_BKGP = bound_scores(step.query_BKGD, table.kmin_BKPD, table.kmax_BKPD)
            if self.used == "alpha":
                empty = (table.page_BKP < 0)[:, :, None]
                score_BKGP = (score_BKGP * step.scaling).masked_fill(empty, -torch.inf).softmax(-1)
        score_BKP = score_BKGP.amax(2)
        self.stamp(table, step.max_over_heads(score_BKP) if self.sharing == "layer" else score_BKP)

    def stamp(self, table: PageTable, score_BKP: Tensor) -> None:
        """Stamp the used pages with `now_B`: those with the best scores, and the page of the new token."""
        stamp_BKP, page_BKP, now_B11 = table.state["stamp"], table.page_BKP, table.now_B[:, None, None]
        if self.used == "top_r":
            used_BKP = top_fraction(score_BKP, page_BKP, self.r)
        else:
            used_BKP = score_BKP > self.alpha
        used_BKP = used_BKP | (page_BKP == now_B11.div(self.page_size, rounding_mode="floor"))
        now_B11 = now_B11.to(stamp_BKP.dtype)
        # After a rewind, stamps may be those of tokens that were dropped, ahead of `now_B`.
        stamp_BKP.copy_(torch.where(used_BKP & (page_BKP >= 0), now_B11, stamp_BKP.minimum(now_B11)))
