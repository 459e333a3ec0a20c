"""What policies share that rank single tokens: a window of recent tokens, rings of what queries read, pooling.

Shape suffixes: B batch rows, K page tables (KV heads, or 1 for a whole layer), P page slots, S token slots (here as
many as page slots), Q columns of a prompt block, W queries in a ring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from longthink.config import check_choice, check_flag, check_int
from longthink.policies.base import PageTable, Policy, TrimsPrompt


@dataclass(frozen=True, kw_only=True)
class TokenPolicy(Policy, TrimsPrompt):
    """Base of policies that evict single tokens, never the most recent ones.

    Parameters
    ----------
    pin_prompt
        Never evict a prompt token. Otherwise a prompt longer than the budget keeps its last tokens, and all compete.
    """

    page_size: int = 1
    pin_prompt: bool = True

    def __post_init__(self) -> None:
        check_choice("page_size", self.page_size, (1,))
        check_flag("pin_prompt", self.pin_prompt)

    @override
    def pins_prompt(self) -> bool:
        return self.pin_prompt

    def recent_tokens(self, free_B: Tensor, now_B: Tensor) -> Tensor:
        """How many tokens before `now_B` stay, of the slots that a pinned prompt leaves free.

        Shape B, less than `free_B`, so that a token is left to evict.
        """
        return torch.zeros_like(free_B)

    @override
    def trim(
        self, position_BQ: Tensor, length_B: Tensor, cap_B: Tensor, mass_BKQ: Tensor | None
    ) -> Tensor | None:
        if self.pin_prompt:
            return None
        first_B = (length_B - cap_B).clamp(min=0)
        return ((position_BQ >= first_B[:, None]) & (position_BQ >= 0))[:, None]

    @override
    def protected(self, table: PageTable) -> Tensor:
        return super().protected(table) | self.recent(table)

    def recent(self, table: PageTable) -> Tensor:
        """The most recent tokens, which stay, bool BKS; the token at `now_B` is not yet written."""
        free_B = table.cap_B - table.prompt_pages_B if self.pin_prompt else table.cap_B
        first_B = table.now_B - self.recent_tokens(free_B, table.now_B)
        return table.position_BKS >= first_B[:, None, None]

    def candidates(self, table: PageTable) -> Tensor:
        """All tokens but the recent ones, bool BKS: those that are compared, pinned ones included."""
        return table.resident_BKS & ~self.recent(table)


@dataclass(frozen=True, kw_only=True)
class VotingPolicy(TokenPolicy):
    """Base of policies in which the most recent queries vote for tokens and their neighbours.

    Parameters
    ----------
    window
        Number of last queries that vote. Their tokens stay, as far as they fill at most half of the free slots.
    kernel
        Number of neighbours, the token itself included, over which votes are pooled; odd.
    """

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, 1)
        check_int("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd: allowed is 1, 3, 5, ...")

    @override
    def recent_tokens(self, free_B: Tensor, now_B: Tensor) -> Tensor:
        return free_B.div(2, rounding_mode="floor").clamp(max=self.window)


def record(ring_BKSW: Tensor, read_BKS: Tensor, now_B: Tensor) -> None:
    """Put what the query at `now_B` read of each token in the place of the query `window` steps before, in place.

    What is not finite becomes 0, so that a broken query is gone with its entry. After a rewind the entries of dropped
    queries count until others take their place.
    """
    entry_W = torch.arange(ring_BKSW.shape[-1], device=now_B.device)
    current_B11W = (now_B[:, None] % len(entry_W) == entry_W)[:, None, None]
    read_BKS1 = read_BKS.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(ring_BKSW.dtype)[..., None]
    ring_BKSW.copy_(torch.where(current_B11W, read_BKS1, ring_BKSW))


def pool_neighbours(
    value_BKSW: Tensor, candidate_BKS: Tensor, position_BKS: Tensor, kernel: int, pooling: str
) -> Tensor:
    """Maximum (``max``) or average (``avg``) over each candidate and its neighbours, shape BKSW; 0 elsewhere.

    Neighbours are the candidates next to it in order of position; slots are in no order. Values are at least 0. The
    average is over the neighbours that there are: with zeros beyond the ends, the youngest candidate would have the
    least in each step.
    """
    far = torch.iinfo(position_BKS.dtype).max
    order_BKS = torch.where(candidate_BKS, position_BKS, far).argsort(dim=-1)
    count_BK1 = candidate_BKS.sum(-1, keepdim=True)
    held_BKS = torch.arange(order_BKS.shape[-1], device=order_BKS.device) < count_BK1
    sorted_BKSW = value_BKSW.gather(2, order_BKS[..., None].expand_as(value_BKSW)) * held_BKS[..., None]
    if pooling == "max":
        pooled_BKSW = _over_neighbours(torch.maximum, sorted_BKSW, kernel)
    else:
        counted_BKS1 = _over_neighbours(torch.add, held_BKS[..., None].to(value_BKSW.dtype), kernel)
        pooled_BKSW = _over_neighbours(torch.add, sorted_BKSW, kernel) / counted_BKS1.clamp(min=1)
    back_BKSW = order_BKS.argsort(dim=-1)[..., None].expand_as(value_BKSW)
    return pooled_BKSW.gather(2, back_BKSW) * candidate_BKS[..., None]


def _over_neighbours(join: Callable[[Tensor, Tensor], Tensor], value_BKSW: Tensor, kernel: int) -> Tensor:
    """Join each value with its neighbours along dimension 2, one after the other; 0 beyond the ends.

    In this order tokens with the same neighbours tie, also in a compiled step.
    """
    padded, slots = pad(value_BKSW, (0, 0, kernel // 2, kernel // 2)), value_BKSW.shape[2]
    return reduce(join, (padded.narrow(2, start, slots) for start in range(kernel)))
