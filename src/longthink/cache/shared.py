"""What the last call of a layer has read, for other layers that attend to the same keys and values (Gemma 3n).

Shape suffixes: B batch rows, H query heads, K KV heads, Q queries, N keys that they may read,
S token slots, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longthink import kernels
from longthink.cache.store import SlotStore
from longthink.kernels import LogitRule


class LastRead:
    """Keys, values and mask of a block of queries; nothing after a decode step, which reads the slots."""

    def __init__(self) -> None:
        self._read: tuple[Tensor, Tensor, Tensor] | None = None

    def clear(self) -> None:
        self._read = None

    def keep(self, keys_BKND: Tensor, values_BKND: Tensor, mask_BKQN: Tensor) -> None:
        """Keep what a prompt has read, until the next decode step."""
        self._read = keys_BKND, values_BKND, mask_BKQN

    def keep_turn(self, store: SlotStore, starts: list[int], real_BQ: Tensor | None, columns: int) -> None:
        """Keep what the tokens of a later turn have read, behind so many of each row: it is all in the slots."""
        keys, values, position_BKS = store.keys_BKSD, store.values_BKSD, store.table.position_BKS
        if real_BQ is None:
            real_BQ = torch.ones(len(starts), columns, dtype=torch.bool, device=keys.device)
        query_BQ = torch.tensor(starts, device=keys.device)[:, None] + real_BQ.cumsum(1) - 1
        position_BK1S, query_B1Q1 = position_BKS[:, :, None], query_BQ[:, None, :, None]
        self._read = keys, values, (position_BK1S >= 0) & (position_BK1S <= query_B1Q1)

    def attend(self, query_BHQD: Tensor, scaling: float, rule: LogitRule) -> Tensor | None:
        """Attention of the last tokens of the block, BHQD; None after a decode step."""
        if self._read is None:
            return None
        keys, values, mask_BKQN = self._read
        mask_BKQN = mask_BKQN[:, :, -query_BHQD.shape[2] :]
        keys, values = keys.to(query_BHQD.dtype), values.to(query_BHQD.dtype)
        return kernels.block_attention(query_BHQD, keys, values, mask_BKQN, scaling, rule)
