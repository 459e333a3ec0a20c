"""Recency, the first control: pinned prompt and a window of the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longthink.policies.base import Policy
from longthink.policies.registry import register


@register("recency")
@dataclass(frozen=True, kw_only=True)
class Recency(Policy):
    """Keep the prompt and the most recent tokens, one by one (page size 1): what a policy must beat.

    Differs from the paper: a control of ours (elsewhere "prefix sliding").
    """

    time: ClassVar[str] = "O(L)"
    memory: ClassVar[str] = "O(L)"
    keeps: ClassVar[str] = "prompt + most recent tokens"
    source: ClassVar[str] = "control"
    by_rule: ClassVar[bool] = True

    page_size: int = 1
