"""Attention of a compiled step on a CPU: sums of products, of which the compiler makes loops that read each key once.

That wins for a budget's slots; beside many thousands of them SDPA's blocks do. Without a compiler the sums would make
a tensor of every product, so eager steps take `reference`, which is also the definition.

Shape suffixes: see `reference`.
"""

from __future__ import annotations

from torch import Tensor

from longthink.kernels.reference import masked_softmax, wide_dtype

FEW_ROWS = 4
"""Rows up to which sums of products are faster than what a library has for many: SDPA here, and linear layers."""


def decode_attention(
    query_BKGD: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    resident_BKS: Tensor,
    scaling: float,
    *,
    with_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new token per row: see `reference.decode_attention`."""
    wide = wide_dtype(query_BKGD.dtype)
    logits_BKGS = (query_BKGD.to(wide)[:, :, :, None] * keys_BKSD.to(wide)[:, :, None]).sum(-1) * scaling
    weights_BKGS = masked_softmax(logits_BKGS, resident_BKS[:, :, None])
    if values_BKSD.dtype == wide:
        out_BKGD = weights_BKGS @ values_BKSD
    else:
        # Narrow values are widened as they are read.
        out_BKGD = (weights_BKGS[..., None] * values_BKSD.to(wide)[:, :, None]).sum(-2)
    return out_BKGD.to(query_BKGD.dtype), weights_BKGS if with_weights else None
