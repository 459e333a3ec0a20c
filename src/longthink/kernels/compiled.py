"""Kernels for compiled steps on a CPU: sums of products, which the compiler turns into loops; and compiler helpers.

The loops read each key once, also through a block table: faster for the slots of a budget, while SDPA's blocking wins
over many thousands. Eagerly the sums would materialise every product. Shape suffixes: see `reference`.
"""

import os
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from longthink.kernels.packing import PackedPages, Part, layouts, planes, rotate
from longthink.kernels.reference import (
    PLAIN,
    LogitRule,
    PagedKV,
    gather_blocks,
    logit_weights,
    masked_softmax,
    wide_dtype,
)

FEW_ROWS = 4
"""Batch size up to which sums of products are faster than library kernels: SDPA here, and linear layers."""


def decode_attention(
    query_BKGD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor, resident_BKS: Tensor, scaling: float, *,
    with_weights: bool, rule: LogitRule = PLAIN,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    wide = wide_dtype(query_BKGD.dtype)
    weights_BKGS = _weights(query_BKGD, keys_BKSD, resident_BKS, scaling, rule)
    if values_BKSD.dtype == wide:
        out_BKGD = weights_BKGS @ values_BKSD
    else:
        out_BKGD = (weights_BKGS[..., None] * values_BKSD.to(wide)[:, :, None]).sum(-2)
    return out_BKGD.to(query_BKGD.dtype), weights_BKGS if with_weights else None


def paged_attention(query_BKGD: Tensor, paged: PagedKV, scaling: float) -> Tensor:
    """Attention over the blocks of a table, read in place: see `reference.paged_attention`.

    Summing each page first takes a half to a third of the time of one long dependent sum, or of a matrix product,
    which needs a copy.
    """
    wide, tokens = wide_dtype(query_BKGD.dtype), paged.values_XTKD.shape[1]
    keys, values, resident = gather_blocks(paged, query_BKGD.shape[1])
    weights_BKGS = _weights(query_BKGD, keys, resident, scaling)
    values_BKPTD = values.to(wide).unflatten(2, (-1, tokens))
    page_BKGPD = (weights_BKGS.unflatten(-1, (-1, tokens))[..., None] * values_BKPTD[:, :, None]).sum(-2)
    return page_BKGPD.sum(-2).to(query_BKGD.dtype)


def _weights(
    query_BKGD: Tensor, keys_BKSD: Tensor, resident_BKS: Tensor, scaling: float, rule: LogitRule = PLAIN
) -> Tensor:
    wide = wide_dtype(query_BKGD.dtype)
    logits_BKGS = (query_BKGD.to(wide)[:, :, :, None] * keys_BKSD.to(wide)[:, :, None]).sum(-1) * scaling
    return logit_weights(logits_BKGS, resident_BKS[:, :, None], rule)


def tiered_attention(
    query_BKGD: Tensor, full: tuple[Tensor, Tensor], packed: PackedPages, order_BKD: Tensor, resident_BKS: Tensor,
    page_size: int, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over slots in full and packed pages, whose codes are read once, where they are: see `packing`.

    Steps and minima are taken out of the sums: ``q.k = sum (q * step) * code + q.minimum``, and likewise for values.
    """
    wide = wide_dtype(query_BKGD.dtype)
    key_layout, value_layout = layouts(packed, page_size)
    query_BKG1D, (near_keys, near_values) = query_BKGD.to(wide)[:, :, :, None], (x.to(wide) for x in full)
    # A product, because the compiler would take a gather into the loops, one number at a time.
    chosen_BKDD = order_BKD[..., None] == torch.arange(order_BKD.shape[-1], device=order_BKD.device)
    far_BKG1D = (query_BKGD.to(wide) @ chosen_BKDD.to(wide).mT)[:, :, :, None]
    step_BK1PD, low_BK1PD = (x[:, :, None] for x in packed.key_scales_BKP2D.to(wide).unbind(-2))
    near_BKGS = (query_BKG1D * near_keys[:, :, None]).sum(-1)
    scaled_BKGP11D = (far_BKG1D * step_BK1PD)[:, :, :, :, None, None]
    far_BKGPT = (far_BKG1D * low_BK1PD).sum(-1, keepdim=True)
    for channels, _, codes_BKPJRD in planes(packed.key_codes_BKPN, page_size, key_layout):
        dots_BKGPJR = (scaled_BKGP11D[..., channels] * codes_BKPJRD.to(wide)[:, :, None]).sum(-1)
        far_BKGPT = far_BKGPT + dots_BKGPJR.flatten(-2)
    logits_BKGS = torch.cat([near_BKGS, far_BKGPT.flatten(-2)], -1) * scaling
    weights_BKGS = masked_softmax(logits_BKGS, resident_BKS[:, :, None])
    near_BKGS, far_BKGS = weights_BKGS.split([near_keys.shape[2], far_BKGPT[0, 0, 0].numel()], -1)
    out_BKGD = (near_BKGS[..., None] * near_values[:, :, None]).sum(-2)
    rotated_BKGD = _packed_values(far_BKGS, packed, page_size, value_layout)
    return (out_BKGD + rotate(rotated_BKGD)).to(query_BKGD.dtype), weights_BKGS


def _packed_values(weights_BKGS: Tensor, packed: PackedPages, page_size: int, layout: list[Part]) -> Tensor:
    """The weighted sum of packed values, rotated, BKGD; each page is summed first."""
    wide = weights_BKGS.dtype
    step_BK1PTC, low_BK1PTC = (x[:, :, None] for x in packed.value_scales_BKP2TC.to(wide).unbind(-3))
    weights_BKGPT1 = weights_BKGS.unflatten(-1, (-1, page_size))[..., None]
    scaled_BKGPTC, groups = weights_BKGPT1 * step_BK1PTC, step_BK1PTC.shape[-1]
    out_BKGC1 = (weights_BKGPT1 * low_BK1PTC).sum((-3, -2))[..., None]
    for _, below, codes_BKPJRD in planes(packed.value_codes_BKPN, page_size, layout):
        codes_BKPJRCX = codes_BKPJRD.to(wide).unflatten(-1, (groups, -1))
        scaled_BKGPJRC = scaled_BKGPTC.unflatten(-2, codes_BKPJRD.shape[3:5])
        page_BKGPCX = (scaled_BKGPJRC[..., None] * codes_BKPJRCX[:, :, None]).sum((-4, -3))
        out_BKGC1 = out_BKGC1 + page_BKGPCX.sum(-3) * (1 << below)
    return out_BKGC1.flatten(-2)


def bound_scores(query_BKGD: Tensor, kmin_BKPD: Tensor, kmax_BKPD: Tensor) -> Tensor:
    wide = wide_dtype(query_BKGD.dtype)
    query = query_BKGD.to(wide)[:, :, :, None]
    highest, lowest = (x.to(wide)[:, :, None] for x in (kmax_BKPD, kmin_BKPD))
    return (query.clamp(min=0) * highest + query.clamp(max=0) * lowest).sum(-1)


def is_compile_disabled() -> bool:
    return os.environ.get("TORCHDYNAMO_DISABLE") == "1" or bool(torch._dynamo.config.disable)


def compile_isolated(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a copy of a function: the compiler counts and caches programs by code object."""
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, fullgraph=True, **options)


def without_guards(program: Any) -> Callable[..., Any] | None:
    """Return the code that a compiled program runs, without its guards; None if it was compiled more than once.

    Guards check every tensor and module of a call, which takes 4 to 7 percent of a small model's step. Only a caller
    that knows that nothing they check has changed may skip them.
    """
    own = program._torchdynamo_orig_callable
    made = _debug_get_cache_entry_list(own.__code__)
    return types.FunctionType(made[0].code, own.__globals__, own.__name__) if len(made) == 1 else None


def mark_dynamic(tensor: Tensor, *dims: int) -> Tensor:
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor
