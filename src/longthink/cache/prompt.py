"""A prompt on its way into a cache: how many page slots it gets, and its columns while it comes in chunks.

Shape suffixes: B batch rows, K KV heads, Q new columns, N columns so far, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longthink.config import Budget
from longthink.errors import BudgetError, CacheStateError
from longthink.policies import Policy, needs_budget


@dataclass(frozen=True)
class UserPages:
    """Pages of a row that hold what the user wrote: the prompt, and the prompts of later turns.

    Attributes
    ----------
    count
        How many there are. A page counts in whole, whatever else stands in it.
    end
        The first page behind the last of them.
    """

    count: int = 0
    end: int = 0

    def and_then(self, start: int, tokens: int, page_size: int) -> UserPages:
        """Those and the pages of `tokens` more tokens from position `start` on."""
        if not tokens:
            return self
        end = (start + tokens - 1) // page_size + 1
        return UserPages(self.count + end - max(start // page_size, self.end), end)


def page_caps(policy: Policy, budget: Budget | None, lengths: list[int], *, turns: bool = False) -> list[int]:
    """Page slots of each row, if its prompt fits.

    Parameters
    ----------
    lengths
        Tokens of each row's prompt; with `turns`, of all its prompts, in whole pages.

    Raises
    ------
    BudgetError
        If one does not fit.
    """
    page_size = policy.page_size
    if budget is None or not needs_budget(policy):
        return [-(-length // page_size) for length in lengths]
    caps = [budget.pages(length, page_size) for length in lengths]
    for length, cap in zip(lengths, caps, strict=True):
        required = policy.required_pages(length)
        if cap < required:
            raise BudgetError(
                f"{budget} holds {cap} pages of {page_size} tokens, but policy {policy.name!r} needs "
                f"{required} for {'prompts' if turns else 'a prompt'} of {length} tokens. Give budget >= {required * page_size}, or "
                f"decode_budget=... (tokens on top of the prompt), or a policy that evicts prompt tokens"
            )
    return caps


class ChunkedPrompt:
    """Keys and values of a prompt that comes piece by piece, held until its last column is there.

    A policy may choose what to keep from the whole prompt only, so nothing is dropped before.

    Parameters
    ----------
    columns
        Columns of the whole prompt, padding included.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.seen = 0
        self._keys_BKND: Tensor | None = None
        self._values_BKND: Tensor | None = None
        self._real_BN: Tensor | None = None
        self._mass_BKN: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether the last column is there."""
        return self.seen == self.columns

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(tensor.nbytes for tensor in (self._keys_BKND, self._values_BKND) if tensor is not None)

    def add(self, key_BKQD: Tensor, value_BKQD: Tensor, real_BQ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take in the next columns, and return keys, values and padding mask of all columns so far.

        Raises
        ------
        CacheStateError
            If there are more columns than the prompt has.
        """
        start, self.seen = self.seen, self.seen + real_BQ.shape[1]
        if self.seen > self.columns:
            raise CacheStateError(f"a prompt of {self.columns} columns was announced, and {self.seen} came")
        if self.complete and start == 0:
            return key_BKQD, value_BKQD, real_BQ
        if self._keys_BKND is None or self._values_BKND is None or self._real_BN is None:
            rows, heads, _, head_dim = key_BKQD.shape
            self._keys_BKND = key_BKQD.new_empty(rows, heads, self.columns, head_dim)
            self._values_BKND = value_BKQD.new_empty(rows, heads, self.columns, head_dim)
            self._real_BN = real_BQ.new_empty(rows, self.columns)
        self._keys_BKND[:, :, start : self.seen] = key_BKQD
        self._values_BKND[:, :, start : self.seen] = value_BKQD
        self._real_BN[:, start : self.seen] = real_BQ
        seen = slice(self.seen)
        return self._keys_BKND[:, :, seen], self._values_BKND[:, :, seen], self._real_BN[:, seen]

    def add_mass(self, mass_BKN: Tensor) -> Tensor:
        """Add the attention that the columns so far got from the last piece, and return what they got in all."""
        if self._mass_BKN is None:
            self._mass_BKN = mass_BKN.new_zeros(*mass_BKN.shape[:2], self.columns)
        self._mass_BKN[..., : self.seen] += mass_BKN
        return self._mass_BKN[..., : self.seen]


def causal_mask(real_BN: Tensor, queries: int) -> Tensor:
    """Let each of the last `queries` columns read the real ones up to itself. B1QN."""
    columns = real_BN.shape[1]
    causal_QN = torch.ones(queries, columns, dtype=torch.bool, device=real_BN.device).tril(columns - queries)
    return causal_QN & real_BN[:, None, None]
