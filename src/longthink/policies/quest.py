"""Quest: keep everything and read only the most promising pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_int
from longthink.kernels import bound_scores, top_pages
from longthink.policies.base import PageTable, Policy, PolicyInfo, SelectsPages
from longthink.policies.dense import Dense
from longthink.policies.registry import register


@register("quest")
@dataclass(frozen=True, kw_only=True)
class Quest(Policy, SelectsPages):
    """Keep everything; each step and KV head reads the pages with the highest bound (arXiv 2406.10774, algorithm 1).

    Differs from the paper: one selection per KV head (maximum over its query heads), whose pages are read once for
    the whole group. The authors' code leaves the first two layers dense: ``dense_layers=2``.

    Parameters
    ----------
    dense_layers
        Number of leading layers that stay dense.
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)", memory="O(N)", keeps="everything; reads the best pages", source="arXiv 2406.10774"
    )
    bounds = "reads"

    dense_layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("dense_layers", self.dense_layers, 0)

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"key_bounds"})

    @override
    def required_pages(self, prompt: int) -> int:
        return 1

    @override
    def for_layer(self, layer_idx: int) -> Policy:
        return Dense(page_size=self.page_size) if layer_idx < self.dense_layers else self

    @override
    def select(self, table: PageTable, query_BKGD: Tensor) -> Tensor:
        page_BKP = table.page_BKP
        score_BKP = bound_scores(query_BKGD, table.kmin_BKPD, table.kmax_BKPD).amax(2)
        tail_B11 = table.now_B.div(self.page_size, rounding_mode="floor")[:, None, None]
        score_BKP = torch.where(page_BKP == tail_B11, torch.inf, score_BKP)
        slot_BKR = top_pages(score_BKP, page_BKP, table.cap)
        # Rows of a batch may read different numbers of pages; the surplus slots are masked out.
        surplus = torch.arange(slot_BKR.shape[-1], device=slot_BKR.device) >= table.cap_B[:, None, None]
        return torch.where(surplus, -1, slot_BKR)
