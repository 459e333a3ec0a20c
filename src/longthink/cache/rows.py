"""What is counted of each row on the host: tokens seen, page slots, and pages that the user wrote.

Detecting that a page opens must not synchronise with the device, so these are Python lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

from longthink.config import Budget
from longthink.errors import BudgetError
from longthink.policies import Policy, grows, needs_budget


@dataclass(frozen=True)
class PromptPages:
    """Pages of a row that hold tokens of a prompt, that of the first turn or of a later one.

    Attributes
    ----------
    ranges
        First logical page of each run of them, and the one after its last.
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def count(self) -> int:
        """How many. A page counts in full, whatever else is in it."""
        return sum(end - first for first, end in self.ranges)

    def extended(self, start: int, tokens: int, page_size: int) -> PromptPages:
        """With the pages of `tokens` more prompt tokens from position `start` on."""
        if not tokens:
            return self
        first, end = start // page_size, -(-(start + tokens) // page_size)
        if self.ranges and first <= self.ranges[-1][1]:
            return PromptPages((*self.ranges[:-1], (self.ranges[-1][0], end)))
        return PromptPages((*self.ranges, (first, end)))

    def before(self, page: int) -> PromptPages:
        """Those before a logical page."""
        return PromptPages(tuple((first, min(end, page)) for first, end in self.ranges if first < page))


class RowCounts:
    """Lengths, caps and prompt pages of the rows of one layer.

    Parameters
    ----------
    policy, budget
        Those of the layer.

    Attributes
    ----------
    lengths
        Tokens that each row has seen.
    caps
        Page slots that each row may fill, or read where the cache grows.
    prompts
        Prompt pages of each row.
    spread
        Page slots that a row fills beyond the pages of its text: a policy may move tokens to other slots, and what is
        left of them after a rewind may stand in many.
    """

    def __init__(self, policy: Policy, budget: Budget | None) -> None:
        self._policy = policy
        self._budget = budget
        self.lengths: list[int] = []
        self.caps: list[int] = []
        self.prompts: list[PromptPages] = []
        self.spread: list[int] = []

    def select(self, rows: Sequence[int]) -> None:
        """Reorder rows: row i becomes the old row ``rows[i]``."""
        self.lengths = [self.lengths[row] for row in rows]
        self.caps = [self.caps[row] for row in rows]
        self.prompts = [self.prompts[row] for row in rows]
        self.spread = [self.spread[row] for row in rows]

    def only(self, row: int) -> RowCounts:
        """Counts of one row alone."""
        counts = copy(self)
        counts.select([row])
        return counts

    def adopt(self, row: int, other: RowCounts) -> None:
        """Replace a row by the only row of another cache."""
        self.lengths[row], self.caps[row] = other.lengths[0], other.caps[0]
        self.prompts[row], self.spread[row] = other.prompts[0], other.spread[0]

    def add_token(self) -> bool | None:
        """Count one token more for every row.

        Returns
        -------
        bool or None
            None if no row opens a page; else whether one of them may have to evict.
        """
        page_size, lengths = self._policy.page_size, self.lengths
        self.lengths = [length + 1 for length in lengths]
        if all(length % page_size for length in lengths):
            return None
        pages = (
            length // page_size + 1 + spread for length, spread in zip(lengths, self.spread, strict=True)
        )
        return not grows(self._policy) and any(page > cap for page, cap in zip(pages, self.caps, strict=True))

    # Prompts ------------------------------------------------------------------------------------------------

    def first_caps(self, lengths: list[int]) -> list[int]:
        """Caps for first prompts of these lengths.

        Raises
        ------
        BudgetError
            If a prompt does not fit.
        """
        return self.page_caps(lengths)

    def later_caps(self, counts: list[int]) -> list[int]:
        """Caps when so many tokens of a later turn are added.

        Raises
        ------
        BudgetError
            If they do not fit.
        """
        if not needs_budget(self._policy):
            return self.first_caps(
                [length + count for length, count in zip(self.lengths, counts, strict=True)]
            )
        prompts = [pages.count * self._policy.page_size for pages in self._prompts_with(counts)]
        return self.page_caps(prompts, turns=True)

    def page_caps(self, lengths: list[int], *, turns: bool = False) -> list[int]:
        """`page_caps` under this policy and budget."""
        return page_caps(self._policy, self._budget, lengths, turns=turns)

    def check_room(self, lengths: list[int] | None, counts: list[int] | None, columns: int) -> None:
        """Raise `BudgetError` if prompts of so many tokens do not fit once the rows are rewound to these lengths."""
        if not self.lengths:
            self.first_caps([columns] if counts is None else counts)
            return
        after = copy(self)
        if lengths is not None:
            after.prompts = list(self.prompts)
            after.rewind(lengths, [0] * len(lengths))
        after.later_caps([columns] * len(self.lengths) if counts is None else counts)

    def slots_needed(self, counts: list[int]) -> list[int]:
        """Page slots that each row would fill with so many tokens more, if nothing were evicted."""
        page_size = self._policy.page_size
        return [
            min(-(-old // page_size) + spread, cap) + -(-(old + count) // page_size) - -(-old // page_size)
            for old, spread, cap, count in zip(self.lengths, self.spread, self.caps, counts, strict=True)
        ]

    def add_prompt(self, counts: list[int], caps: list[int]) -> None:
        """Count the tokens of a prompt, the first or that of a later turn, which gives the rows these caps."""
        self.prompts = self._prompts_with(counts)
        old = self.lengths or [0] * len(counts)
        self.lengths = [length + count for length, count in zip(old, counts, strict=True)]
        self.caps = caps
        self.spread = self.spread or [0] * len(counts)

    def rewind(self, lengths: list[int], filled: list[int]) -> None:
        """Forget the tokens from these lengths on; so many page slots of each row hold others.

        Caps follow with the next turn.
        """
        pages = [-(-length // self._policy.page_size) for length in lengths]
        self.prompts = [prompt.before(page) for prompt, page in zip(self.prompts, pages, strict=True)]
        self.spread = [max(0, slots - page) for slots, page in zip(filled, pages, strict=True)]
        self.lengths = list(lengths)

    def _prompts_with(self, counts: list[int]) -> list[PromptPages]:
        old = self.lengths or [0] * len(counts)
        prompts = self.prompts or [PromptPages()] * len(counts)
        return [
            pages.extended(start, count, self._policy.page_size)
            for pages, start, count in zip(prompts, old, counts, strict=True)
        ]


def page_caps(policy: Policy, budget: Budget | None, lengths: list[int], *, turns: bool = False) -> list[int]:
    """Page slots that each row may fill.

    Parameters
    ----------
    lengths
        Tokens of each row's prompt; with `turns`, of the pages of all its prompts.

    Raises
    ------
    BudgetError
        If a prompt does not fit.
    """
    page_size = policy.page_size
    if budget is None or not needs_budget(policy):
        return [-(-length // page_size) for length in lengths]
    caps = [budget.pages(length, page_size) for length in lengths]
    for length, cap in zip(lengths, caps, strict=True):
        required = policy.required_pages(length)
        if cap < required:
            what = "prompts" if turns else "a prompt"
            raise BudgetError(
                f"{budget} holds {cap} pages of {page_size} tokens, but policy {policy.name!r} needs "
                f"{required} for {what} of {length} tokens. Give budget >= {required * page_size}, or "
                "decode_budget=... (tokens on top of the prompt), or a policy that evicts prompt tokens, such as "
                "'raas:pin_prompt=false'"
            )
    return caps
