"""TOVA: evict the token that the last query attends to least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_choice
from longthink.policies.base import PageTable, PolicyInfo, Shape, SharesTable, Step
from longthink.policies.registry import register
from longthink.policies.tokens import TokenPolicy


@register("tova")
@dataclass(frozen=True, kw_only=True)
class TOVA(TokenPolicy, SharesTable):
    """Keep what the last query attends to, averaged over the heads of the layer (arXiv 2401.06104).

    No token is favoured for its place, so the newest may go as well. Differs from the paper: eviction precedes the
    write, so that the budget is a hard bound; the prompt is pinned; if it is not, a prompt longer than the budget
    keeps its last tokens, because the attention of its last query is not known here.

    Parameters
    ----------
    sharing
        One page table per ``layer``, with the mean over all heads, as in the paper, or one per ``kv_head``, with the
        mean over the query heads of its group.
    pin_prompt
        Never evict a prompt token. Otherwise a prompt longer than the budget keeps its last tokens, and all compete.
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)",
        memory="O(L)",
        keeps="prompt + tokens that the last query attends to",
        source="arXiv 2401.06104",
    )

    sharing: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("sharing", self.sharing, ("kv_head", "layer"))

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"weights"})

    @override
    def tables(self, kv_heads: int) -> int:
        return 1 if self.sharing == "layer" else kv_heads

    @override
    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        return {"attention": torch.zeros(shape.B, shape.K, shape.P, device=device)}

    @override
    def worth(self, table: PageTable) -> Tensor:
        return table.state["attention"]

    @override
    def observe(self, table: PageTable, step: Step) -> None:
        attention_BKS = step.weights_BKGS.mean(2)
        if self.sharing == "layer":
            attention_BKS = attention_BKS.mean(1, keepdim=True)
        table.state["attention"].copy_(attention_BKS)
