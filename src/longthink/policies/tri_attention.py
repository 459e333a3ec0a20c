"""TriAttention: keep the tokens whose keys typical queries would attend to from the distances to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_int, check_path
from longthink.policies.base import Calibrated, PageTable, PolicyInfo
from longthink.policies.registry import register
from longthink.policies.tokens import TokenPolicy

_DISTANCES = tuple(2**i for i in range(17))
"""Distances ahead over which the score of a key is averaged: 1 to 65536."""
_STEPS = 4096
"""Standardised scores are compared in steps of one in so many."""


@register("tri_attention")
@dataclass(frozen=True, kw_only=True)
class TriAttention(TokenPolicy, Calibrated):
    """Evict the key that the centre of the prompt's queries scores lowest over future distances (arXiv 2604.04921).

    Before RoPE, a query and a key are a complex number ``q_f``, ``k_f`` for each frequency ``w_f``. With means over
    the queries of a head, a key at position p seen from distance ``d = t + 2**j - p``, t the round's start, scores
    ``sum_f |E q_f| |k_f| cos(w_f d + arg(E q_f) - arg(k_f)) + sum_f (E |q_f| - |E q_f|) |k_f|``, averaged over j of 0
    to 16. Scores are standardised over the tokens that compete, per query head; the worth of a token is the maximum
    over the query heads of its KV head. Tokens of this round of `window` steps do not compete.

    Differs from the paper: without `stats`, means are those of the row's own first prompt; a full row evicts one
    token in each step, so that the budget is a hard bound, and not a round's worth at its end. Worths are compared in
    steps of 1/4096.

    Parameters
    ----------
    stats
        File of ``longthink calibrate`` with means over the queries of other texts; ``prompt`` for the first prompt.
    window
        Steps in a round.
    pin_prompt
        Never evict a prompt token.
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)",
        memory="O(L)",
        keeps="prompt + most recent tokens + keys near the prompt's queries",
        source="arXiv 2604.04921",
    )

    stats: str = "prompt"
    window: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("stats", self.stats)
        check_int("window", self.window, 1)

    @property
    @override
    def needs(self) -> frozenset[str]:
        needs = frozenset({"query_stats", "vectors"})
        return needs if self.stats == "prompt" else needs | {"calibration"}

    @override
    def stats_file(self) -> str:
        return self.stats

    @override
    def recent_tokens(self, free_B: Tensor, now_B: Tensor) -> Tensor:
        # This round so far; in a small budget at least one token competes.
        return torch.minimum(now_B % self.window, free_B - 1)

    @override
    def worth(self, table: PageTable) -> Tensor:
        score_BKGS = self.scores(table).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        competes_BK1S = ((table.page_BKP >= 0) & ~self.protected(table))[:, :, None]
        count_BK11 = competes_BK1S.sum(-1, keepdim=True).clamp(min=1)
        distance = score_BKGS - (score_BKGS * competes_BK1S).sum(-1, keepdim=True) / count_BK11
        deviation = ((distance**2 * competes_BK1S).sum(-1, keepdim=True) / count_BK11).sqrt()
        # Two tokens that compete are one deviation apart from their mean for every head: rounding must not decide.
        return ((distance / deviation.clamp(min=1e-6)).amax(2) * _STEPS).round()

    def scores(self, table: PageTable) -> Tensor:
        """What a typical query of each head gives the keys over the distances ahead, BKGS."""
        keys_BKSD = table.rotation.paired(table.keys_BKSD).to(table.query_stats_BH3F.dtype)
        stats_BKG3F = table.query_stats_BH3F.unflatten(1, (keys_BKSD.shape[1], -1))
        real, imaginary, magnitude = stats_BKG3F.unbind(3)
        turn, pull = self._turns(table, real.dtype)
        # A sum of cosines is one product of rotated keys with the centre, rotated to the position it looks from.
        centre_BKGD = torch.cat([real * turn - imaginary * pull, real * pull + imaginary * turn], -1)
        size_BKSF = torch.hypot(*keys_BKSD.chunk(2, -1))
        spread_BKGF = magnitude - torch.hypot(real, imaginary)
        return centre_BKGD @ keys_BKSD.transpose(2, 3) + spread_BKGF @ size_BKSF.transpose(2, 3)

    def _turns(self, table: PageTable, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean cosine and sine of the angles at which each frequency is seen from the distances ahead, B11F."""
        ahead_J = torch.tensor(_DISTANCES, dtype=torch.float64, device=table.now_B.device)
        place_BJ1 = (self._round_start(table)[:, None] + ahead_J)[..., None]
        angle_BJF = place_BJ1 * table.rotation.inv_freq_D.double()
        turns = angle_BJF.cos().mean(1), angle_BJF.sin().mean(1)
        turn_B11F, pull_B11F = (part[:, None, None].to(dtype) for part in turns)
        return turn_B11F, pull_B11F

    def _round_start(self, table: PageTable) -> Tensor:
        return table.now_B.div(self.window, rounding_mode="floor") * self.window
