"""Bytes and tokens of a layer's cache.

Shape suffixes: B batch rows, K KV heads, S token slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longthink.cache.prompt import ChunkedPrompt
from longthink.cache.rows import RowCounts
from longthink.cache.store import SlotStore
from longthink.policies import Policy, grows


class CacheStats:
    """Read-only statistics of a `LayerCache`."""

    policy: Policy
    _store: SlotStore | None
    _chunks: ChunkedPrompt | None
    rows: RowCounts
    dense_numbers: int | None = None
    """Numbers that the model's own cache keeps of a token, if they are not the keys and values that are kept here."""

    @property
    def store(self) -> SlotStore:
        """The slots; only after prefill."""
        assert self._store is not None
        return self._store

    @property
    def length_B(self) -> Tensor:
        """Tokens that each row has seen, without padding, on the host."""
        return torch.tensor(self.rows.lengths, dtype=torch.int64)

    @property
    def sizes(self) -> tuple[torch.Size, int]:
        """Shape of the slots, and the largest cap: what may change when rows come and go."""
        return self.store.keys_BKSD.shape, self.store.table.cap

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        held = [] if self._store is None else [self._store.keys_BKSD.nbytes, self._store.values_BKSD.nbytes]
        return sum(held) + (self._chunks.nbytes if self._chunks else 0)

    @property
    def metadata_bytes(self) -> int:
        """Bytes allocated for positions, key bounds and policy state."""
        return 0 if self._store is None else sum(tensor.nbytes for tensor in self._store.tensors()[2:])

    @property
    def bound_tokens(self) -> int | None:
        """Most tokens that a row may hold, in whole pages; None where the cache grows or is empty."""
        if self._store is None or grows(self.policy):
            return None
        return self._store.table.cap * self.policy.page_size

    @property
    def dense_kv_bytes(self) -> int:
        """Bytes that a dense cache would take for keys and values."""
        return sum(self.row_dense_kv_bytes(row) for row in range(len(self.rows.lengths)))

    @property
    def num_evicted(self) -> int:
        """Evicted tokens, summed over rows and KV heads."""
        return sum(self.row_evicted(row) for row in range(len(self.rows.lengths)))

    def row_dense_kv_bytes(self, row: int) -> int:
        """Bytes that a dense cache would take for keys and values of a row."""
        keys, values = self.store.keys_BKSD[0, :, 0], self.store.values_BKSD[0, :, 0]
        numbers = self.dense_numbers or keys.numel() + values.numel()
        return self.rows.lengths[row] * numbers * keys.itemsize

    def row_evicted(self, row: int) -> int:
        """Evicted tokens of a row, summed over KV heads."""
        resident_KS = self.store.table.resident_BKS[row]
        shared = self.store.keys_BKSD.shape[1] // len(resident_KS)
        return (self.rows.lengths[row] * len(resident_KS) - int(resident_KS.sum())) * shared

    @property
    def position_BKS(self) -> Tensor | None:
        """Logical position in each token slot, -1 where empty; K is 1 where one table serves the layer."""
        return None if self._store is None else self._store.table.position_BKS

    def resident_positions(self) -> list[list[list[int]]]:
        """Sorted logical positions resident in each row and KV head."""
        if self._store is None:
            return []
        position_BKS = self._store.table.position_BKS.expand(-1, self._store.keys_BKSD.shape[1], -1)
        return [[sorted(p for p in head if p >= 0) for head in row] for row in position_BKS.tolist()]
