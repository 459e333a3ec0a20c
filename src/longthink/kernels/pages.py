"""Writing to pages in place, wherever they lie: in the slots of a layer or in the blocks of a pool.

Whoever owns the memory says by index where a token or a page is; what happens there is written here, once.
Whole index tensors instead of scatter and gather: a compiler writes those in place, without a copy of the cache.

Shape suffixes: B batch rows, K KV heads (1 where one page table serves a whole layer), T tokens in a page, S token
slots, P page slots, D head dim, M tokens moved. L, where a caller has it, counts layers in front of B.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

Index = tuple[Tensor, ...]
"""Index tensors that name one entry of a tensor for each row and KV head, and leave its last dimensions."""


class At(NamedTuple):
    """Entries of a tensor."""

    tensor: Tensor
    place: Index


def logical_pages(position_BKS: Tensor, page_size: int) -> Tensor:
    """Logical page in each slot (the largest position // page_size), -1 where the slot is empty. Shape BKP.

    The maximum is taken in halves: a compiler vectorises that over slots, but makes scalar code of a maximum over a
    few tokens. Page sizes are powers of two: a shift is exact, and much cheaper than a division.
    """
    last_BKPT, tokens = position_BKS.unflatten(-1, (-1, page_size)), page_size
    while tokens > 1:
        # By numbers that a compiler knows, where it does not know how many slots there are.
        tokens //= 2
        last_BKPT = torch.maximum(last_BKPT[..., :tokens], last_BKPT[..., tokens:])
    return last_BKPT[..., 0] >> (page_size.bit_length() - 1)


def entries(index_BKM: Tensor, tensor: Tensor) -> Index:
    """Rows, heads and entries of dimension 2 that the index names, for all KV heads of the tensor."""
    rows, heads = (torch.arange(size, device=index_BKM.device) for size in tensor.shape[:2])
    return rows[:, None, None], heads[:, None], index_BKM


def append(keys: At, values: At, key: Tensor, value: Tensor) -> None:
    """Write a token's key and value; the cache may be of a narrower format."""
    for (tensor, place), new in ((keys, key), (values, value)):
        tensor[place] = new.to(tensor.dtype)


def widen(kmin: At, kmax: At, key: Tensor, first: Tensor) -> None:
    """Widen the key bounds of a page by a new key; the first key of a page starts them anew.

    Parameters
    ----------
    first
        True where the token is the first one of its page, broadcastable to the keys.
    """
    for (tensor, place), extreme in ((kmin, torch.minimum), (kmax, torch.maximum)):
        new = key.to(tensor.dtype)
        tensor[place] = torch.where(first, new, extreme(tensor[place], new))


def empty(positions: At, contents: Iterable[At], where: Tensor | None = None) -> None:
    """Empty pages: no positions, and zeros for keys, values and state.

    Old numbers must go too: a NaN left behind would reach the output through its zero weight.

    Parameters
    ----------
    where
        Rows (B) whose page is emptied; None for all.
    """
    for (tensor, place), nothing in ((positions, -1), *((content, 0) for content in contents)):
        if where is None:
            tensor[place] = nothing
        else:
            rows = where.view(-1, *[1] * (tensor.ndim - 1))
            tensor[place] = torch.where(rows, nothing, tensor[place])


def move_tokens(
    positions: tuple[Tensor, Index, Index], contents: Iterable[tuple[Tensor, Index, Index]]
) -> None:
    """Carry tokens to other places: (tensor, source, target) of positions, and of all that goes with a token.

    A source that does not become a target is empty afterwards. A pair with source == target moves nothing. No source
    may be the target of another pair.
    """
    for tensor, source, target in contents:
        tensor[target] = tensor[source]
    tensor, source, target = positions
    moved = tensor[source]
    tensor[source] = -1
    tensor[target] = moved
