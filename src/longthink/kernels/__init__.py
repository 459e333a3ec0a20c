"""Tensor functions over pages, independent of any policy, dispatched by device.

`reference` defines them in plain torch; `pages` writes to pages in place; `compiled` is for compiled steps on a CPU.
Tensors on a GPU go to the Triton kernel of the same name, where there is one (docs/kernels.md).
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from longthink.kernels import compiled, packing, reference
from longthink.kernels.packing import PackedPages
from longthink.kernels.pages import At, Index, append, empty, entries, logical_pages, move_tokens, widen
from longthink.kernels.reference import (
    PLAIN,
    LogitRule,
    PagedKV,
    block_attention,
    column_mass,
    key_bounds,
    lowest,
    page_mass,
    top_fraction,
    top_pages,
)

__all__ = [
    "HAS_TRITON", "PLAIN", "At", "Index", "LogitRule", "PackedPages", "PagedKV", "append", "block_attention",
    "bound_scores", "column_mass", "decode_attention", "empty", "entries", "key_bounds", "logical_pages",
    "lowest", "move_tokens", "page_mass", "paged_attention", "runs_triton", "tiered_attention", "top_fraction",
    "top_pages", "widen",
]  # fmt: skip


HAS_TRITON = find_spec("triton") is not None
"""Looked up once, here: torch's compiler traces `runs_triton`, and cannot trace a search for a package."""


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels support the tensor's device and dtype, and Triton is installed."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and HAS_TRITON


def decode_attention(
    query_BKGD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor, resident_BKS: Tensor, scaling: float, *,
    with_weights: bool, many: bool = False, rule: LogitRule = PLAIN,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of one new token per row: see `reference.decode_attention`.

    `many` marks the slots of a cache that grows: on a CPU, SDPA is faster over them. The Triton kernels know neither
    rules nor values of another head dim than that of keys.
    """
    attention = reference.decode_attention
    if runs_triton(query_BKGD) and rule.is_plain and keys_BKSD.shape[-1] == values_BKSD.shape[-1]:
        from longthink.kernels.triton_decode import decode_attention

        return decode_attention(
            query_BKGD, keys_BKSD, values_BKSD, resident_BKS, scaling, with_weights=with_weights
        )
    if (
        query_BKGD.is_cpu
        and torch.compiler.is_compiling()
        and not many
        and (
            # SDPA is faster for large batches, unless it would have to widen the keys first.
            len(query_BKGD) <= compiled.FEW_ROWS or keys_BKSD.dtype != query_BKGD.dtype
        )
    ):
        attention = compiled.decode_attention
    return attention(
        query_BKGD, keys_BKSD, values_BKSD, resident_BKS, scaling, with_weights=with_weights, rule=rule
    )


def paged_attention(query_BKGD: Tensor, paged: PagedKV, scaling: float) -> Tensor:
    attention = reference.paged_attention
    if runs_triton(query_BKGD):
        from longthink.kernels.triton_decode import paged_attention as attention
    elif query_BKGD.is_cpu and torch.compiler.is_compiling():
        attention = compiled.paged_attention
    return attention(query_BKGD, paged, scaling)


def tiered_attention(
    query_BKGD: Tensor, full: tuple[Tensor, Tensor], packed: PackedPages, order_BKD: Tensor, resident_BKS: Tensor,
    page_size: int, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of one new token per row over slots in full and packed pages: see `packing.tiered_attention`."""
    by_sums = query_BKGD.is_cpu and torch.compiler.is_compiling()
    attention = (compiled if by_sums else packing).tiered_attention
    return attention(query_BKGD, full, packed, order_BKD, resident_BKS, page_size, scaling)


def bound_scores(query_BKGD: Tensor, kmin_BKPD: Tensor, kmax_BKPD: Tensor) -> Tensor:
    by_sums = query_BKGD.is_cpu and torch.compiler.is_compiling()
    return (compiled if by_sums else reference).bound_scores(query_BKGD, kmin_BKPD, kmax_BKPD)
