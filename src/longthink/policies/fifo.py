"""FIFO, a control: RaaS that calls every page used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from longthink.policies.base import Policy
from longthink.policies.registry import register


@register("fifo")
@dataclass(frozen=True, kw_only=True)
class Fifo(Policy):
    """Keep the prompt and evict whole pages in the order in which they were written.

    The same rule as `recency`, at the page size of RaaS; RaaS with r = 1 gives the same residents.
    Differs from the paper: a control of ours.
    """

    time: ClassVar[str] = "O(L)"
    memory: ClassVar[str] = "O(L)"
    keeps: ClassVar[str] = "prompt + most recent pages"
    source: ClassVar[str] = "control (RaaS with r = 1)"
    by_rule: ClassVar[bool] = True
