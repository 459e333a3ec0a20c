"""The buffer of a chunked prefill, and the mask of prompts.

Shape suffixes: B batch rows, K KV heads, Q new columns, N columns so far, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longthink.errors import CacheStateError


class ChunkedPrompt:
    """Keys and values of a chunked prefill until its last chunk: policies choose what to keep from the whole prompt.

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
        return self.seen == self.columns

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self._keys_BKND, self._values_BKND) if tensor is not None)

    def add(self, key_BKQD: Tensor, value_BKQD: Tensor, real_BQ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append a chunk; returns keys, values and padding mask of all columns so far.

        Raises
        ------
        CacheStateError
            If there are more columns than announced.
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
        """Add the attention that the columns received from the last chunk; returns their sums so far."""
        if self._mass_BKN is None:
            self._mass_BKN = mass_BKN.new_zeros(*mass_BKN.shape[:2], self.columns)
        self._mass_BKN[..., : self.seen] += mass_BKN
        return self._mass_BKN[..., : self.seen]


def causal_mask(real_BN: Tensor, queries: int) -> Tensor:
    """Causal mask of the last `queries` columns over all real columns, shape B1QN."""
    columns = real_BN.shape[1]
    causal_QN = torch.ones(queries, columns, dtype=torch.bool, device=real_BN.device).tril(columns - queries)
    return causal_QN & real_BN[:, None, None]
