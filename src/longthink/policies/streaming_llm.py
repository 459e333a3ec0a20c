"""StreamingLLM: attention sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_choice, check_int
from longthink.kernels import Rule
from longthink.policies.base import PageTable, Policy
from longthink.policies.registry import register


@register("streaming_llm")
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Keep the first `sinks` tokens and the most recent ``budget - sinks`` (arXiv 2309.17453, section 3.2).

    Differs from the paper: nothing with ``positions="cache"``. The authors number the tokens inside the cache by
    caching keys before RoPE; the window moves as one, so turning the sinks alone gives the same attention.

    Parameters
    ----------
    sinks
        Tokens at the start that always stay.
    positions
        ``cache``: distances are those inside the cache, as in the paper. ``logical``: sinks keep their true
        distance, which grows with the text.
    """

    time: ClassVar[str] = "O(L)"
    memory: ClassVar[str] = "O(L)"
    keeps: ClassVar[str] = "attention sinks + most recent tokens"
    source: ClassVar[str] = "arXiv 2309.17453"

    page_size: int = 1
    sinks: int = 4
    positions: str = "cache"

    def __post_init__(self) -> None:
        check_choice("page_size", self.page_size, (1,))
        check_int("sinks", self.sinks, 0)
        check_choice("positions", self.positions, ("cache", "logical"))

    @property
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
    def rule(self, table: PageTable) -> Rule:
        return Rule(torch.full_like(table.prompt_B, self.sinks))

    @override
    def key_shift(self, table: PageTable) -> tuple[int, Tensor] | None:
        if self.positions == "logical" or self.sinks == 0:
            return None
        return self.sinks, (table.now_B + 1 - table.cap_B).clamp(min=0).to(torch.int64)
