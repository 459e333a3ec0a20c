"""LazyEviction: keep the tokens whose importance is due to return, by their longest pause so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_int, check_range
from longthink.policies.base import PageTable, PolicyInfo, Shape, Step
from longthink.policies.registry import register
from longthink.policies.tokens import TokenPolicy


@register("lazy_eviction")
@dataclass(frozen=True, kw_only=True)
class LazyEviction(TokenPolicy):
    """Evict the token that is unimportant for long, compared with its longest pause (arXiv 2506.15969, eq. 1 and 2).

    A token is important in a step that gives it more than `alpha` of its attention. With ``t`` the current step,
    ``TS`` the last step in which it was important and ``MRI`` the longest interval between two such steps, its worth
    is ``2 sigmoid(-(t - TS) / MRI) + 2 sigmoid(-(MRI - 1))``, and 0 if it has not been important again (MRI = 0).

    Differs from the paper: a full row evicts one token in each step, by the worth in that step, so that the budget is
    a hard bound; the paper evicts all surplus tokens every `window` steps. Under GQA a token is important if it is to
    any query head of its KV head. The second term is that of the authors' code.

    Parameters
    ----------
    alpha
        Share of a query's attention above which a token is important.
    window
        Number of most recent tokens that are not evicted, the new one included; at most the unpinned budget.
    pin_prompt
        Never evict a prompt token (our control; off in the paper).
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)",
        memory="O(L)",
        keeps="prompt + most recent tokens + tokens whose importance is due to return",
        source="arXiv 2506.15969",
    )

    alpha: float = 0.0001
    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0.0, 1.0)
        check_int("window", self.window, 1)

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"weights"})

    @override
    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        return {
            name: torch.zeros(shape.B, shape.K, shape.P, dtype=torch.int32, device=device)
            for name in ("stamp", "interval")
        }

    @override
    def admit(self, table: PageTable, mass_BKS: Tensor | None) -> None:
        # The prompt was read at its end: intervals begin there.
        end_B11 = (table.now_B - 1)[:, None, None]
        table.state["stamp"].copy_(torch.where(table.page_BKP >= 0, end_B11, 0))

    @override
    def recent_tokens(self, free_B: Tensor, now_B: Tensor) -> Tensor:
        # The new token, which needs the slot, is one of the window.
        return free_B.clamp(max=self.window) - 1

    @override
    def worth(self, table: PageTable) -> Tensor:
        interval_BKP = table.state["interval"].double()
        # After a rewind, stamps may be ahead of `now_B`: see `observe`.
        pause_BKP = (table.now_B[:, None, None] - table.state["stamp"]).clamp(min=0)
        due_BKP = 2 * torch.sigmoid(-pause_BKP / interval_BKP.clamp(min=1))
        often_BKP = 2 * torch.sigmoid(1 - interval_BKP)
        return torch.where(interval_BKP > 0, due_BKP + often_BKP, 0.0)

    @override
    def observe(self, table: PageTable, step: Step) -> None:
        stamp_BKP, interval_BKP, page_BKP = table.state["stamp"], table.state["interval"], table.page_BKP
        now_B11 = table.now_B[:, None, None].to(stamp_BKP.dtype)
        important_BKP = (step.weights_BKGS.amax(2) > self.alpha) & (page_BKP >= 0)
        new_BKP = page_BKP == now_B11
        # After a rewind, stamps may be those of tokens that were dropped, ahead of `now_B`.
        stamp_BKP.clamp_(max=now_B11)
        pause_BKP = torch.where(important_BKP & ~new_BKP, now_B11 - stamp_BKP, 0)
        interval_BKP.copy_(interval_BKP.maximum(pause_BKP))
        stamp_BKP.copy_(torch.where(important_BKP | new_BKP, now_B11, stamp_BKP))
