"""Dense: the full KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from longthink.policies.base import Policy, PolicyInfo
from longthink.policies.registry import register


@register("dense")
@dataclass(frozen=True, kw_only=True)
class Dense(Policy):
    """Keep and read everything: the reference for every other policy. Differs from the paper: nothing."""

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(N)", memory="O(N)", keeps="everything", source="the transformer itself (arXiv 1706.03762)"
    )
    bounds = "nothing"

    @override
    def required_pages(self, prompt: int) -> int:
        return 0
