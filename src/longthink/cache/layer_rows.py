"""Rows of a layer's cache that change places, come and go: beam search and continuous batching."""

from __future__ import annotations

import torch
from torch import Tensor

from longthink.cache.stats import CacheStats
from longthink.errors import CacheStateError
from longthink.policies import grows


class LayerRows(CacheStats):
    """The part of a `LayerCache` that moves whole rows."""

    later_turns: bool

    def refresh_compile_marks(self) -> None:
        """Mark again after tensors were replaced."""
        raise NotImplementedError

    def select_rows(self, rows: Tensor) -> None:
        """Reorder rows: row i becomes the old row ``rows[i]`` (beam search, batch changes)."""
        if self._store is None:
            return
        self._store.apply(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        self.rows.select(rows.tolist())
        self._store.set_caps(self.rows.caps)

    def adopt(self, row: int, other: LayerRows) -> None:
        """Copy the only row of another cache into a row, or behind the last (continuous batching).

        Raises
        ------
        CacheStateError
            If a cache is empty, or the other has several rows.
        """
        if self._store is None or other._store is None or len(other.rows.lengths) != 1:
            raise CacheStateError("adopt needs a cache with rows, and another with exactly one row")
        if row == len(self.rows.lengths):
            # The new row is a copy of any: all of it is overwritten.
            self.select_rows(torch.tensor([*range(row), 0]))
        self._store.adopt(row, other._store)
        self.rows.adopt(row, other.rows)
        self.later_turns |= other.later_turns
        self._store.set_caps(self.rows.caps)
        self.release()

    def take_row(self, row: int, other: LayerRows) -> None:
        """Become a copy of one row of another cache of the same policy."""
        self._store, self.rows = other.store.only(row), other.rows.only(row)
        self.later_turns = other.later_turns
        self.store.set_caps(self.rows.caps)
        self.release()

    def release(self) -> None:
        """Free slots that no row can use, after a long row has left."""
        if self._store is None:
            return
        needed = max(self.rows.lengths) // self.policy.page_size + 1
        # A cache that grows keeps spare slots, or the next page would copy it again.
        self._store.release(needed + needed // 2 if grows(self.policy) else max(self.rows.caps))
        self.refresh_compile_marks()
