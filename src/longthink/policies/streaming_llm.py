"""StreamingLLM: keep the attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_choice, check_int
from longthink.kernels.reference import wide_dtype
from longthink.policies.base import PageTable, Policy, PolicyInfo, ShiftsKeys, TrimsPrompt, holds_first
from longthink.policies.registry import register


@register("streaming_llm")
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy, TrimsPrompt, ShiftsKeys):
    """Keep the first `sinks` tokens and the most recent ``budget - sinks`` (arXiv 2309.17453, section 3.2).

    Differs from the paper: nothing, with ``positions="cache"``. The authors cache keys before RoPE and assign
    positions inside the cache. The window shifts as one block, so rotating only the sinks gives the same attention.

    Parameters
    ----------
    sinks
        Number of first tokens that are never evicted.
    positions
        ``cache``: distances inside the cache, as in the paper. ``logical``: sinks keep their true distance, which
        grows with the sequence.
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)", memory="O(L)", keeps="attention sinks + most recent tokens", source="arXiv 2309.17453"
    )

    page_size: int = 1
    sinks: int = 4
    positions: str = "cache"

    def __post_init__(self) -> None:
        check_choice("page_size", self.page_size, (1,))
        check_int("sinks", self.sinks, 0)
        check_choice("positions", self.positions, ("cache", "logical"))

    @override
    def pins_prompt(self) -> bool:
        return False

    @override
    def required_pages(self, prompt: int) -> int:
        return self.sinks + 1

    @override
    def trim(self, position_BQ: Tensor, length_B: Tensor, cap_B: Tensor, mass_BKQ: Tensor | None) -> Tensor:
        window_B1 = (length_B - (cap_B - self.sinks).clamp(min=0))[:, None]
        kept_BQ = (position_BQ >= 0) & ((position_BQ < self.sinks) | (position_BQ >= window_B1))
        return kept_BQ[:, None]

    @override
    def protected(self, table: PageTable) -> Tensor:
        return holds_first(table, torch.full_like(table.prompt_B, self.sinks))

    @override
    def shifted_tokens(self) -> int:
        return self.sinks if self.positions == "cache" else 0

    @override
    def shift_keys(self, table: PageTable, keys_BKND: Tensor, inv_freq_D: Tensor) -> Tensor:
        # Tokens evicted so far: they all stood between the sinks and the window.
        evicted_BK = table.position_BKS.amax(-1) + 1 - table.resident_BKS.sum(-1)
        return rotate_keys(keys_BKND, evicted_BK[:, 0], inv_freq_D)


def rotate_keys(keys_BKND: Tensor, shift_B: Tensor, inv_freq_D: Tensor) -> Tensor:
    """Rotate keys that carry RoPE (half-split layout) to `shift_B` positions later.

    `inv_freq_D` holds the rotation per position of each of the D / 2 frequency pairs.
    """
    angle = shift_B.to(torch.float64)[:, None] * inv_freq_D.to(torch.float64)
    angle = torch.cat([angle, angle], -1)[:, None, None]
    keys = keys_BKND.to(wide_dtype(keys_BKND.dtype))
    first, second = keys.chunk(2, -1)
    rotated = keys * angle.cos().to(keys.dtype) + torch.cat([-second, first], -1) * angle.sin().to(keys.dtype)
    return rotated.to(keys_BKND.dtype)
