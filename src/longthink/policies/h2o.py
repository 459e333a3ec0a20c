"""H2O: keep the heavy hitters, by accumulated attention, and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_choice, check_flag, check_range
from longthink.policies.base import PageTable, Policy, PolicyInfo, Shape, Step, TrimsPrompt
from longthink.policies.registry import register


@register("h2o")
@dataclass(frozen=True, kw_only=True)
class H2O(Policy, TrimsPrompt):
    """Keep the tokens with the largest accumulated attention and the most recent ones (arXiv 2306.14048, alg. 1).

    A token's score is the softmax attention it has received since it entered the cache, prefill included, summed over
    queries and over the query heads of a KV head. Differs from the paper: eviction precedes the write, so that the
    budget is a hard bound; under GQA scores are kept per KV head.

    Parameters
    ----------
    heavy
        Fraction of the budget for heavy hitters; the rest is the window of recent tokens.
    pin_prompt
        Keep all prompt tokens and split only the rest of the budget (our control; off in the paper).
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)",
        memory="O(L)",
        keeps="most attended tokens + most recent tokens",
        source="arXiv 2306.14048",
    )

    page_size: int = 1
    heavy: float = 0.5
    pin_prompt: bool = False

    def __post_init__(self) -> None:
        check_choice("page_size", self.page_size, (1,))
        check_range("heavy", self.heavy, 0.0, 1.0)
        check_flag("pin_prompt", self.pin_prompt)

    @override
    def pins_prompt(self) -> bool:
        return self.pin_prompt

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"weights", "prompt_mass"})

    @override
    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        return {"mass": torch.zeros(shape.B, shape.K, shape.P, device=device)}

    @override
    def trim(
        self, position_BQ: Tensor, length_B: Tensor, cap_B: Tensor, mass_BKQ: Tensor | None
    ) -> Tensor | None:
        if self.pin_prompt:
            return None
        assert mass_BKQ is not None
        real_BQ = position_BQ >= 0
        recent_BQ = real_BQ & (position_BQ >= (length_B - self._recent(cap_B))[:, None])
        worth_BKQ = torch.where(recent_BQ[:, None], torch.inf, mass_BKQ.nan_to_num(nan=0.0))
        worth_BKQ = torch.where(real_BQ[:, None], worth_BKQ, -torch.inf)
        # A tie evicts the lowest position: sort by descending position, then stably by descending worth.
        late_first = position_BQ.argsort(-1, descending=True)[:, None].expand_as(worth_BKQ)
        order = late_first.gather(
            -1, worth_BKQ.gather(-1, late_first).argsort(dim=-1, descending=True, stable=True)
        )
        return (order.argsort(-1) < cap_B[:, None, None]) & real_BQ[:, None]

    @override
    def admit(self, table: PageTable, mass_BKS: Tensor | None) -> None:
        assert mass_BKS is not None
        table.state["mass"].add_(mass_BKS)

    @override
    def protected(self, table: PageTable) -> Tensor:
        newest_B = table.now_B - self.recent_pages(table)
        return super().protected(table) | (table.page_BKP > newest_B[:, None, None])

    @override
    def worth(self, table: PageTable) -> Tensor:
        return table.state["mass"]

    @override
    def observe(self, table: PageTable, step: Step) -> None:
        table.state["mass"].add_(step.weights_BKGS.sum(2))

    def recent_pages(self, table: PageTable) -> Tensor:
        """Number of most recent tokens that each row protects, shape B."""
        return self._recent(table.cap_B - table.prompt_pages_B if self.pin_prompt else table.cap_B)

    def _recent(self, capacity_B: Tensor) -> Tensor:
        return capacity_B - (capacity_B.double() * self.heavy + 1e-9).floor().to(capacity_B.dtype)
