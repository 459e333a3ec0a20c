"""Recency, the first control: pinned prompt and a window of the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longthink.policies.base import Policy, PolicyInfo
from longthink.policies.registry import register


@register("recency")
@dataclass(frozen=True, kw_only=True)
class Recency(Policy):
    """Keep the prompt and the most recent tokens, one by one (page size 1): what a policy must beat.

    With ``page_size=16`` it evicts whole pages in the order in which they were written, as RaaS does that calls every
    page used; ``fifo`` is short for that. Differs from the paper: a control of ours (elsewhere "prefix sliding").
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)",
        memory="O(L)",
        keeps="prompt + most recent tokens",
        source="control",
    )

    page_size: int = 1
