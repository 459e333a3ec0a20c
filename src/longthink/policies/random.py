"""Random, a control: pin the prompt and evict random pages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_int
from longthink.policies.base import PageTable, Policy, PolicyInfo
from longthink.policies.registry import register


@register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Keep the prompt and evict a uniformly random page, drawn independently per layer, KV head and step.

    Draws depend only on `seed`, layer, head, page and step, so a row gets the same ones alone and in a batch.
    Differs from the paper: it evicts tokens, and this pages, as the policies do that it is a control for.

    Parameters
    ----------
    seed
        Seed of the draws.
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)", memory="O(L)", keeps="prompt + random pages", source="control (arXiv 2609.03430)"
    )

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("seed", self.seed, 0, (1 << 63) - 1)

    @override
    def for_layer(self, layer_idx: int) -> Policy:
        return replace(self, seed=(self.seed + 1_000_003 * layer_idx) % (1 << 63))

    @override
    def worth(self, table: PageTable) -> Tensor:
        return draws(self.seed, table.page_BKP, table.now_B)


_MASK64 = (1 << 64) - 1


def draws(seed: int, page_BKP: Tensor, now_B: Tensor) -> Tensor:
    """Uniform pseudo-random integers that depend only on (seed, KV head, page, step), shape BKP.

    A counter-based generator, so that batching changes no draw. With all arithmetic modulo 2**64, ``mix`` the
    finaliser of splitmix64 (``z += 0x9E3779B97F4A7C15; z = (z ^ z >> 30) *
    0xBF58476D1CE4E5B9; z = (z ^ z >> 27) * 0x94D049BB133111EB; z ^ z >> 31``, shifts unsigned) and ``h`` the
    index of the KV head: ``x = mix(mix(mix(mix(seed) + h) + page) + now)``, of which the upper 32 bits count.
    """
    # The first two rounds as numbers: the compiler folds sums of such constants, and cannot wrap around.
    streams = [_signed(_mix_number(_mix_number(seed) + head)) for head in range(page_BKP.shape[1])]
    x = _mix(torch.tensor(streams, device=page_BKP.device)[:, None] + page_BKP.long())
    x = _mix(x + now_B[:, None, None])
    return _shift(x, 32)


def _mix_number(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK64
    return x ^ x >> 31


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right as if the int64 were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
