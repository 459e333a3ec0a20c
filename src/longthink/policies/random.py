"""Random, the control that any clever choice must beat: pinned prompt, random eviction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from longthink.config import check_int
from longthink.kernels import hash_priority
from longthink.policies.base import PageTable, Policy
from longthink.policies.registry import register


@register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Keep the prompt and evict a uniformly random page, drawn anew for each layer, KV head and step.

    The draws depend on nothing but `seed`, layer, head, page and step: a row gets the same ones alone and in a
    batch. Differs from the paper: arXiv 2609.03430 evicts tokens; here pages, like the policies it is a control for.

    Parameters
    ----------
    seed
        Seed of the draws.
    """

    time: ClassVar[str] = "O(L)"
    memory: ClassVar[str] = "O(L)"
    keeps: ClassVar[str] = "prompt + random pages"
    source: ClassVar[str] = "control (arXiv 2609.03430)"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("seed", self.seed, 0, (1 << 63) - 1)

    @override
    def for_layer(self, layer_idx: int) -> Policy:
        return replace(self, seed=(self.seed + 1_000_003 * layer_idx) % (1 << 63))

    @override
    def priority(self, table: PageTable) -> Tensor:
        return hash_priority(self.seed, table.page_BKP, table.now_B)
