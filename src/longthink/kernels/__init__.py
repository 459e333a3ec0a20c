"""Tensor functions over pages, behind one set of names: nothing here knows a policy.

`reference` defines them in plain torch and runs on every device, `pages` writes to pages in place. Tensors on a GPU
go to Triton kernels of the same names, where there are some and Triton is installed (docs/kernels.md); `compiled` is
what a compiled step does its own way on a CPU.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from longthink.kernels import compiled, reference
from longthink.kernels.pages import At, Index, append, empty, entries, logical_pages, move_tokens, widen
from longthink.kernels.reference import (
    PagedKV,
    block_attention,
    column_mass,
    lowest,
    page_mass,
    top_fraction,
    top_pages,
)

__all__ = [
    "At",
    "Index",
    "PagedKV",
    "append",
    "block_attention",
    "bound_scores",
    "column_mass",
    "decode_attention",
    "empty",
    "entries",
    "logical_pages",
    "lowest",
    "move_tokens",
    "page_mass",
    "paged_attention",
    "runs_triton",
    "top_fraction",
    "top_pages",
    "widen",
]


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def runs_triton(tensor: Tensor) -> bool:
    """Whether there are Triton kernels for where the tensor is and what it holds."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and _has_triton()


def decode_attention(
    query_BKGD: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    resident_BKS: Tensor,
    scaling: float,
    *,
    with_weights: bool,
    many: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new token per row: see `reference.decode_attention`.

    `many` says that the slots are those of a cache that grows, for which another way is fastest on a CPU.
    """
    attention = reference.decode_attention
    if runs_triton(query_BKGD):
        from longthink.kernels.triton_decode import decode_attention as attention
    elif (
        query_BKGD.is_cpu
        and torch.compiler.is_compiling()
        and not many
        and (
            # SDPA is faster for many rows, unless it would have to widen the keys first.
            len(query_BKGD) <= compiled.FEW_ROWS or keys_BKSD.dtype != query_BKGD.dtype
        )
    ):
        attention = compiled.decode_attention
    return attention(query_BKGD, keys_BKSD, values_BKSD, resident_BKS, scaling, with_weights=with_weights)


def paged_attention(query_BKGD: Tensor, paged: PagedKV, scaling: float) -> Tensor:
    """Attention of one new token per row over the blocks of its table: see `reference.paged_attention`."""
    attention = reference.paged_attention
    if runs_triton(query_BKGD):
        from longthink.kernels.triton_decode import paged_attention as attention
    elif query_BKGD.is_cpu and torch.compiler.is_compiling():
        attention = compiled.paged_attention
    return attention(query_BKGD, paged, scaling)


def bound_scores(query_BKGD: Tensor, kmin_BKPD: Tensor, kmax_BKPD: Tensor) -> Tensor:
    """Quest's upper bound of the largest q.k in each page: see `reference.bound_scores`."""
    by_sums = query_BKGD.is_cpu and torch.compiler.is_compiling()
    return (compiled if by_sums else reference).bound_scores(query_BKGD, kmin_BKPD, kmax_BKPD)
