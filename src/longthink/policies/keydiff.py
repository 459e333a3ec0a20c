"""KeyDiff: evict the token whose key is most like the mean of all keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_range
from longthink.kernels.reference import wide_dtype
from longthink.policies.base import PageTable, PolicyInfo
from longthink.policies.registry import register
from longthink.policies.tokens import TokenPolicy


@register("keydiff")
@dataclass(frozen=True, kw_only=True)
class KeyDiff(TokenPolicy):
    """Keep the keys that differ most from the mean of the normalised keys (arXiv 2504.15364).

    The token goes whose key has the greatest cosine with the mean of the resident keys, each divided by its norm.
    It needs no attention weights. `recent_share` is the paper's sliding window, which it uses for reasoning.
    Differs from the paper: it evicts once per block of a prompt, here one token leaves before one is written; the
    prompt is pinned, and if it is not, a prompt longer than the budget keeps its last tokens.

    Parameters
    ----------
    recent_share
        Fraction of the slots that a pinned prompt leaves free for the most recent tokens, which stay.
    pin_prompt
        Never evict a prompt token. Otherwise a prompt longer than the budget keeps its last tokens, and all compete.
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)",
        memory="O(L)",
        keeps="prompt + tokens with unusual keys + most recent tokens",
        source="arXiv 2504.15364",
    )

    recent_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("recent_share", self.recent_share, 0.0, 1.0)

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"vectors"})

    @override
    def recent_tokens(self, free_B: Tensor, now_B: Tensor) -> Tensor:
        # The offset cancels binary rounding: 0.7 * 10 slots must count 7.
        share_B = (free_B.double() * self.recent_share + 1e-9).floor().to(free_B.dtype)
        return torch.minimum(share_B, free_B - 1).clamp(min=0)

    @override
    def worth(self, table: PageTable) -> Tensor:
        unit_BKSD = unit_vectors(table.keys_BKSD, table.resident_BKS)
        # Neither the norm of the mean nor its count changes the order.
        return -(unit_BKSD @ unit_BKSD.sum(2)[..., None])[..., 0]


def unit_vectors(keys_BKSD: Tensor, resident_BKS: Tensor) -> Tensor:
    """Keys divided by their norm, in float32 or wider, BKSD; 0 for empty slots and for keys that are not finite."""
    keys = keys_BKSD.to(wide_dtype(keys_BKSD.dtype))
    norm_BKS1 = torch.linalg.vector_norm(keys, dim=-1, keepdim=True) + 1e-8
    usable_BKS1 = resident_BKS[..., None] & (norm_BKS1 < torch.inf)
    return torch.where(usable_BKS1, keys / norm_BKS1, 0.0)
