"""The window of one attention layer: the latest tokens of each row, in slots that are overwritten in turn.

Shape suffixes: B batch rows, H query heads, K KV heads, S slots, Q new columns, N columns of the text, or columns
that a query may read, D head dim (keys and values may differ in it).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from longthink import kernels
from longthink.kernels import LogitRule

_TENSORS = ("keys_BKSD", "values_BKSD", "column_BS", "now_B", "start_B")


class Window:
    """Keys and values of the last `size` columns of each row; padding is a column as well.

    Column c stands in slot ``c % slots``. There are fewer slots than `size` only as long as they hold the whole text,
    so a short text takes little and a long one no more than the window.

    Parameters
    ----------
    size
        Columns that a query reads at most, its own included.
    chunked
        Whether a query reads what comes before it in its own chunk of `size` columns, counted from the row's first
        token, instead of the last `size` columns.

    Attributes
    ----------
    columns
        Columns that the longest row has read.
    aligned
        Whether all rows have read the same columns; those of an engine have not.
    """

    keys_BKSD: Tensor
    values_BKSD: Tensor
    column_BS: Tensor  # that of each slot; -1 for padding and for none
    now_B: Tensor  # columns that the row has read
    start_B: Tensor  # the row's first column that is not padding

    def __init__(self, size: int, *, chunked: bool = False) -> None:
        self.size = size
        self.chunked = chunked
        self.reset()

    def reset(self) -> None:
        """Drop the contents and free the slots."""
        self.columns = 0
        self.aligned = True
        self.is_allocated = self.padding_is_known = False
        for name in _TENSORS:
            self.__dict__.pop(name, None)

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors, none before the first column."""
        return {name: getattr(self, name) for name in _TENSORS} if self.is_allocated else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set what `named_tensors` has returned."""
        for name in _TENSORS:
            setattr(self, name, tensors[name])
        self.is_allocated = True

    @property
    def slots(self) -> int:
        return self.keys_BKSD.shape[2]

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.keys_BKSD.nbytes + self.values_BKSD.nbytes if self.is_allocated else 0

    # Slots and rows -----------------------------------------------------------------------------------------

    def allocate(self, key_BKQD: Tensor, value_BKQD: Tensor) -> None:
        """Make a row without slots for each row of these keys, unless there are some."""
        if self.is_allocated:
            return
        self.keys_BKSD, self.values_BKSD = (
            x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_BKQD, value_BKQD)
        )
        rows, device = len(key_BKQD), key_BKQD.device
        self.column_BS = torch.empty(rows, 0, dtype=torch.int64, device=device)
        self.now_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.start_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.is_allocated = True

    def reserve(self, columns: int) -> None:
        """Allocate the slots for a text of so many columns."""
        if (missing := min(columns, self.size) - self.slots) > 0:
            # Slots that are too few hold columns from 0 on, each in the slot of its number.
            more = min(max(missing, self.slots), self.size - self.slots)
            self.keys_BKSD, self.values_BKSD = (
                pad(tensor, (0, 0, 0, more)) for tensor in (self.keys_BKSD, self.values_BKSD)
            )
            self.column_BS = pad(self.column_BS, (0, more), value=-1)

    def prepare_compile(self) -> None:
        """Allocate all slots and mark static addresses for the compiler."""
        self.reserve(self.size)
        for tensor in self.named_tensors().values():
            if tensor.device.type == "cuda":
                torch._dynamo.mark_static_address(tensor)

    def select_rows(self, rows: Tensor) -> None:
        """Reorder rows: row i becomes the old row ``rows[i]``."""
        for name, tensor in self.named_tensors().items():
            setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))

    def adopt(self, row: int, other: Window) -> None:
        """Copy the only row of another window into a row, or behind the last."""
        if row == len(self.now_B):
            self.select_rows(torch.tensor([*range(row), 0]))
        self.columns, self.aligned = max(self.columns, other.columns), False
        self.reserve(max(self.columns, other.slots))
        self.column_BS[row, other.slots :] = -1
        self.column_BS[row, : other.slots] = other.column_BS[0]
        self.keys_BKSD[row, :, : other.slots] = other.keys_BKSD[0]
        self.values_BKSD[row, :, : other.slots] = other.values_BKSD[0]
        self.now_B[row], self.start_B[row] = other.now_B[0], other.start_B[0]

    def only(self, row: int, length: int) -> Window:
        """A copy of one row, of so many tokens, as a text of its own without padding."""
        alone = Window(self.size, chunked=self.chunked)
        column_S = self.column_BS[row]
        held = column_S.argsort()[int((column_S < 0).sum()) :]
        new = self.keys_BKSD[row : row + 1, :, held], self.values_BKSD[row : row + 1, :, held]
        alone.allocate(*new)
        alone.reserve(length)
        alone.now_B += length - len(held)
        alone.write(*new)
        alone.columns, alone.padding_is_known = length, True
        return alone

    def hide(self, real_BN: Tensor | None) -> None:
        """Mark padding, given which columns are real; None for all."""
        self.padding_is_known = True
        if real_BN is not None:
            real_BS = real_BN.gather(1, self.column_BS.clamp(min=0))
            self.column_BS.masked_fill_(~real_BS, -1)
            self.start_B.copy_((real_BN.cumsum(1) == 0).sum(1))

    # Attention ----------------------------------------------------------------------------------------------

    def write(self, key_BKQD: Tensor, value_BKQD: Tensor) -> None:
        """Put new columns into the slots of the oldest ones: tensor code only, `columns` is counted by the caller."""
        column_BQ = self._new_columns(key_BKQD.shape[2])
        self.now_B.add_(key_BKQD.shape[2])
        column_BQ, key_BKQD, value_BKQD = (
            x[..., -self.slots :, :] if x.ndim > 2 else x[:, -self.slots :]
            for x in (column_BQ, key_BKQD, value_BKQD)
        )
        slot_BQ = column_BQ % self.slots
        self.column_BS.scatter_(1, slot_BQ, column_BQ)
        for own, new in ((self.keys_BKSD, key_BKQD), (self.values_BKSD, value_BKQD)):
            own.scatter_(2, slot_BQ[:, None, :, None].expand_as(new), new.to(own.dtype))

    def update(self, key_BKQD: Tensor, value_BKQD: Tensor) -> tuple[Tensor, Tensor]:
        """Add new columns of aligned rows, and return what transformers' mask is about: the last ``size - 1``, in
        order, and the new ones.
        """
        self.allocate(key_BKQD, value_BKQD)
        first = max(0, self.columns - self.size + 1)
        self.columns += key_BKQD.shape[2]
        old = self.columns - key_BKQD.shape[2]
        self.padding_is_known = False
        read = (key_BKQD, value_BKQD)
        if old > first:
            slot_N = torch.arange(first, old, device=key_BKQD.device) % self.slots
            old_keys, old_values = (own.index_select(2, slot_N) for own in (self.keys_BKSD, self.values_BKSD))
            read = torch.cat([old_keys, key_BKQD], 2), torch.cat([old_values, value_BKQD], 2)
        self.reserve(self.columns)
        self.write(key_BKQD, value_BKQD)
        return read

    def attend(
        self, query_BHQD: Tensor, key_BKQD: Tensor, value_BKQD: Tensor, scaling: float, rule: LogitRule
    ) -> Tensor:
        """Write new tokens, for which there are slots, and return their attention output, BHQD.

        Tensor code only: `columns` is counted by the caller.
        """
        new = query_BHQD.shape[2]
        if new == 1:
            self.write(key_BKQD, value_BKQD)
            return self._read(query_BHQD, scaling, rule)
        read_BQ = self._new_columns(new)
        # Before they are written: the last of them may take the slots of what the first ones read.
        keys, values = torch.cat([self.keys_BKSD, key_BKQD], 2), torch.cat([self.values_BKSD, value_BKQD], 2)
        readable_B1QN = self._readable(read_BQ, torch.cat([self.column_BS, read_BQ], 1))[:, None]
        self.write(key_BKQD, value_BKQD)
        return kernels.block_attention(query_BHQD, keys, values, readable_B1QN, scaling, rule)

    def attend_again(self, query_BHQD: Tensor, scaling: float | None, rule: LogitRule) -> Tensor:
        """Attention of another layer to what the last token has read."""
        scaling = query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling
        return self._read(query_BHQD, scaling, rule)

    def _read(self, query_BHQD: Tensor, scaling: float, rule: LogitRule) -> Tensor:
        """Attention of the token that was written last."""
        query_BKGD = query_BHQD[:, :, 0].unflatten(1, (self.keys_BKSD.shape[1], -1))
        slots = self.keys_BKSD, self.values_BKSD, self._readable(self.now_B[:, None] - 1, self.column_BS)
        out_BKGD, _ = kernels.decode_attention(query_BKGD, *slots, scaling, with_weights=False, rule=rule)
        return out_BKGD.flatten(1, 2)[:, :, None]

    def _new_columns(self, count: int) -> Tensor:
        return self.now_B[:, None] + torch.arange(count, device=self.now_B.device)

    def _readable(self, query_BQ: Tensor, column_BN: Tensor) -> Tensor:
        """Which columns each query may read, BQN."""
        query_BQ1, column_B1N = query_BQ[:, :, None], column_BN[:, None]
        seen_BQN = (column_B1N >= 0) & (column_B1N <= query_BQ1)
        if self.chunked:
            start_B11 = self.start_B[:, None, None]
            return seen_BQN & ((column_B1N - start_B11) // self.size == (query_BQ1 - start_B11) // self.size)
        return seen_BQN & (column_B1N > query_BQ1 - self.size)
