"""Recency, a control: pin the prompt and keep a window of the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longthink.policies.base import Policy, PolicyInfo
from longthink.policies.registry import register


@register("recency")
@dataclass(frozen=True, kw_only=True)
class Recency(Policy):
    """Keep the prompt and the most recent tokens: the baseline that every other policy must beat.

    With ``page_size=16`` (alias ``fifo``) it evicts whole pages in the order in which they were written, which is
    RaaS with every page used. Differs from the paper: none, a control of ours (elsewhere "prefix sliding").
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)", memory="O(L)", keeps="prompt + most recent tokens", source="control"
    )

    page_size: int = 1
