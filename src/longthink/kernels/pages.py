"""In-place writes to pages, in the slots of a layer or the blocks of a pool; the owner passes the indices.

Advanced indexing instead of scatter and gather: the compiler writes it in place, without copying the cache.
Shape suffixes: see `reference`; M tokens moved. L, where a caller has it, counts layers in front of B.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

Index = tuple[Tensor, ...]  # index tensors into the leading dimensions of a tensor, for each row and KV head


class At(NamedTuple):
    tensor: Tensor
    place: Index


def logical_pages(position_BKS: Tensor, page_size: int) -> Tensor:
    """Logical page in each slot (largest position // page_size), -1 where the slot is empty. Shape BKP.

    The maximum is taken by halving: the compiler vectorises that over slots, but not a maximum over a few tokens.
    Page sizes are powers of two, so a shift replaces the slower division.
    """
    last_BKPT, tokens = position_BKS.unflatten(-1, (-1, page_size)), page_size
    while tokens > 1:
        # The page size is a compile-time constant, the number of slots may not be.
        tokens //= 2
        last_BKPT = torch.maximum(last_BKPT[..., :tokens], last_BKPT[..., tokens:])
    return last_BKPT[..., 0] >> (page_size.bit_length() - 1)


def entries(index_BKM: Tensor, tensor: Tensor) -> Index:
    """Index of the entries ``index_BKM`` of dimension 2, for all KV heads of the tensor."""
    rows, heads = (torch.arange(size, device=index_BKM.device) for size in tensor.shape[:2])
    return rows[:, None, None], heads[:, None], index_BKM


def append(keys: At, values: At, key: Tensor, value: Tensor) -> None:
    for (tensor, place), new in ((keys, key), (values, value)):
        tensor[place] = new.to(tensor.dtype)


def widen(kmin: At, kmax: At, key: Tensor, first: Tensor) -> None:
    """Extend the key bounds of a page by a new key; they are reset where it is the `first` of its page."""
    for (tensor, place), extreme in ((kmin, torch.minimum), (kmax, torch.maximum)):
        new = key.to(tensor.dtype)
        tensor[place] = torch.where(first, new, extreme(tensor[place], new))


def empty(positions: At, contents: Iterable[At], where: Tensor | None = None) -> None:
    """Empty pages: positions become -1, keys, values and state 0, in the rows `where` (B), or in all if None.

    Contents must be cleared because a stale NaN would reach the output through its zero weight.
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
    """Move tokens: (tensor, source, target) of positions, and of everything else stored per token.

    A source is empty afterwards unless it is also its own target. No source may be the target of another pair.
    """
    for tensor, source, target in contents:
        tensor[target] = tensor[source]
    tensor, source, target = positions
    moved = tensor[source]
    tensor[source] = -1
    tensor[target] = moved
