"""`KeeperPages`: old tokens are ranked one by one, and the best of them share a few pages."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_int, check_range
from longthink.policies.base import Moves, PageTable, Policy, RanksPages, SavesTokens


@dataclass(frozen=True, kw_only=True)
class KeeperPages(Policy, SavesTokens, RanksPages):
    """Keep the prompt, young pages, and keeper pages for the old tokens with the highest `scores`.

    The first decode pages become the keeper pages. When the oldest young page is evicted, its tokens compete with
    those in the keeper pages; the winners move into the slots of the losers, and ties go to the later token. So whole
    pages are evicted, every `page_size` steps, and yet each token is judged by itself.

    Parameters
    ----------
    keep
        Fraction of the decode pages that are keeper pages, after `young` is served.
    young
        Minimum number of tokens in young pages.
    """

    keep: float = 0.8
    young: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("keep", self.keep, 0.0, 1.0)
        check_int("young", self.young, 1)

    @abstractmethod
    def scores(self, table: PageTable) -> Tensor:
        """Worth of each token, BKS; what it says of empty slots does not matter."""

    @override
    def protected(self, table: PageTable) -> Tensor:
        return super().protected(table) | self._keeper_pages(table)

    @override
    def page_worth(self, table: PageTable) -> Tensor:
        """Mean score of the tokens of each page."""
        score_BKS = self.scores(table) * table.resident_BKS
        count_BKP = table.resident_BKS.unflatten(-1, (-1, self.page_size)).sum(-1)
        return score_BKS.unflatten(-1, (-1, self.page_size)).sum(-1) / count_BKP.clamp(min=1)

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

    def keepers(self, table: PageTable) -> Tensor:
        """Number of keeper pages of each row, shape B."""
        decode_B = self.decode_pages(table)
        count_B = (decode_B.double() * self.keep + 0.5 + 1e-9).floor().to(decode_B.dtype)
        young = -(-self.young // self.page_size)
        return torch.minimum(count_B, (decode_B - young).clamp(min=0))

    def decode_pages(self, table: PageTable) -> Tensor:
        """Page slots of each row beside the prompt's, shape B."""
        return table.cap_B - table.prompt_pages_B

    def _keeper_pages(self, table: PageTable) -> Tensor:
        """The first slots without prompt tokens, bool BKP: decode tokens fill them first; they are never reopened."""
        free_BKP = ~table.prompt_BKP
        return free_BKP & (free_BKP.cumsum(-1) <= self.keepers(table)[:, None, None])

    def _best(self, table: PageTable, candidate_BKS: Tensor) -> Tensor:
        """The best candidates, as many as the keeper pages hold; ties go to the higher position."""
        score_BKS, T = self.scores(table), self.page_size
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


def _smallest(value_BKS: Tensor, of_BKS: Tensor, count: int) -> Tensor:
    """The `count` smallest of the masked values, ascending and padded with the largest value, shape BKT."""
    most = torch.inf if value_BKS.is_floating_point() else torch.iinfo(value_BKS.dtype).max
    return torch.where(of_BKS, value_BKS, most).topk(count, largest=False).values
