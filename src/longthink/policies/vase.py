"""VaSE: keep the tokens with the largest values, and a sample of the rest drawn by attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_int, check_range
from longthink.kernels import top_fraction
from longthink.policies.base import PageTable, Policy, PolicyInfo, Shape, Step
from longthink.policies.random import draws
from longthink.policies.registry import register
from longthink.policies.tokens import TokenPolicy

_SINKS = 4
"""First positions of a text, whose values are small and which count as having the largest."""


@register("vase")
@dataclass(frozen=True, kw_only=True)
class VaSE(TokenPolicy):
    """Evict at random, except tokens with large values, the sooner the less attention (arXiv 2606.03928, VaSE-AttnV).

    Steps form rounds of `window`. The tokens of this round and the last are recent; the older ones compete. Of these,
    the fraction `large` with the largest spread of the value, ``max_d v_d - min_d v_d``, is reserved. The rest is
    sampled without replacement in proportion to ``a``, the attention received in the last complete round: each draws
    ``u`` uniform in (0, 1) once per round, and the least ``log(u) / a`` is evicted first.

    Differs from the paper: a full row evicts one token in each step, in the order in which the sample would lose
    them, so that the budget is a hard bound; the paper evicts a round's worth at its end. Attention is not smoothed
    over neighbours in the cache. Draws depend only on `seed`, layer, KV head, position and round.

    Parameters
    ----------
    window
        Steps in a round.
    large
        Fraction of the competing tokens reserved for the largest values.
    seed
        Seed of the draws.
    pin_prompt
        Never evict a prompt token (our control; off in the paper).
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)",
        memory="O(L)",
        keeps="prompt + most recent tokens + largest values + a sample by attention",
        source="arXiv 2606.03928",
    )

    window: int = 64
    large: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, 1)
        check_range("large", self.large, 0.0, 1.0)
        check_int("seed", self.seed, 0, (1 << 63) - 1)

    @property
    @override
    def needs(self) -> frozenset[str]:
        needs = frozenset({"weights", "vectors"})
        return needs if self.pin_prompt else needs | {"prompt_mass"}

    @override
    def for_layer(self, layer_idx: int) -> Policy:
        return replace(self, seed=(self.seed + 1_000_003 * layer_idx) % (1 << 63))

    @override
    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        # Attention of the last complete round, of this round so far, and the spread of the value.
        return {
            name: torch.zeros(shape.B, shape.K, shape.P, device=device)
            for name in ("attention", "gathered", "spread")
        }

    @override
    def trim(
        self, position_BQ: Tensor, length_B: Tensor, cap_B: Tensor, mass_BKQ: Tensor | None
    ) -> Tensor | None:
        sinks_B = (cap_B - 1).clamp(max=_SINKS)
        latest_B1Q = super().trim(position_BQ, length_B, cap_B - sinks_B, mass_BKQ)
        sink_BQ = (position_BQ >= 0) & (position_BQ < sinks_B[:, None])
        return None if latest_B1Q is None else latest_B1Q | sink_BQ[:, None]

    @override
    def admit(self, table: PageTable, mass_BKS: Tensor | None) -> None:
        table.state["spread"].copy_(_spread(table.values_BKSD))
        if mass_BKS is not None:
            table.state["attention"].copy_(mass_BKS.nan_to_num(nan=0.0))

    @override
    def recent_tokens(self, free_B: Tensor, now_B: Tensor) -> Tensor:
        # This round so far and the last; in a small budget at least one token competes.
        return torch.minimum(now_B % self.window + self.window, free_B - 1)

    @override
    def worth(self, table: PageTable) -> Tensor:
        page_BKP = table.page_BKP
        competing_BKP = torch.where(self.protected(table), -1, page_BKP)
        spread_BKP = table.state["spread"].masked_fill(page_BKP < _SINKS, torch.inf)
        reserved_BKP = top_fraction(spread_BKP, competing_BKP, self.large)
        # The middle of each of the 2**32 intervals, so that u is neither 0 nor 1.
        u_BKP = (draws(self.seed, page_BKP, self._round(table)).double() + 0.5) / 2**32
        # Exponential clocks with rates a: the order in which they ring is that of the sample.
        return torch.where(reserved_BKP, torch.inf, u_BKP.log() / table.state["attention"].double())

    @override
    def observe(self, table: PageTable, step: Step) -> None:
        attention_BKP, gathered_BKP = table.state["attention"], table.state["gathered"]
        gathered_BKP.add_(step.weights_BKGS.sum(2).nan_to_num(nan=0.0))
        ends_B11 = ((table.now_B + 1) % self.window == 0)[:, None, None]
        attention_BKP.copy_(torch.where(ends_B11, gathered_BKP, attention_BKP))
        gathered_BKP.masked_fill_(ends_B11, 0)

        slot_BK1 = (table.page_BKP == table.now_B[:, None, None]).to(torch.int8).argmax(-1, keepdim=True)
        values_BKSD = table.values_BKSD
        index_BK1D = slot_BK1[..., None].expand(-1, -1, 1, values_BKSD.shape[3])
        table.state["spread"].scatter_(2, slot_BK1, _spread(values_BKSD.gather(2, index_BK1D)))

    def _round(self, table: PageTable) -> Tensor:
        return table.now_B.div(self.window, rounding_mode="floor")


def _spread(values_BKSD: Tensor) -> Tensor:
    """Largest minus smallest feature of each value, float32, BKS; 0 where it is not finite."""
    spread_BKS = (values_BKSD.amax(-1) - values_BKSD.amin(-1)).float()
    return spread_BKS.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
