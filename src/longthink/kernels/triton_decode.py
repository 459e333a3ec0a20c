"""Decode attention on a GPU: one launch for split-KV attention, one to combine the splits.

The kernels can also append and write side outputs, for the fused steps of `longthink.accelerators`.
Shape suffixes: see `reference`; C splits.
"""

from __future__ import annotations

from math import inf, log2
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from longthink.kernels.operators import operator
from longthink.kernels.reference import PagedKV
from longthink.kernels.triton_attention import split_kernel
from longthink.kernels.triton_combine import combine_kernel

LOG2E = 1.4426950408889634
PROGRAMS_PER_PROCESSOR = 4  # split programs per multiprocessor: enough to hide memory latency


class Slots(NamedTuple):
    """Page slots of a layer, slot and position of the new token, and key bounds where bound scores are wanted."""

    keys_BKSD: Tensor
    values_BKSD: Tensor
    position_BKS: Tensor
    tail_BK: Tensor
    now_B: Tensor
    page_size: int
    kmin_BKPD: Tensor | None = None
    kmax_BKPD: Tensor | None = None


class SideOutput(NamedTuple):
    """What the kernels write besides the attention output.

    `score`, of the split kernel: 0 nothing, 1 page sums, 2 all logits, 3 the logits of pages in which a token more
    than `near` positions back may have more than `alpha` of a query's attention. `combine`, of the combine kernel: 0
    nothing, 1 the attention share of each page (maximum over the group), 2 the same from the page scores, normalised
    by their own sum, 3 softmax weights, 4 a 1 in `state_BKS` (int8) where such a token has more than `alpha`, 5
    attention summed over the group and added to `state_BKS` (float32); 4 and 5 reset a new page to 0. `bound`, page
    scores from the key bounds: 0 none, 1 the maximum over the group, 2 per query head.
    """

    score: int = 0
    combine: int = 0
    bound: int = 0
    state_BKS: Tensor | None = None
    alpha: float = 0.0
    near: int = 0


class Work(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    tokens: int
    page_size: int
    split_tokens: int
    splits: int
    block: int


def decode_attention(
    query_BKGD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor, resident_BKS: Tensor, scaling: float, *,
    with_weights: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    out_BKGD, weights_BKGS = _decode(query_BKGD, keys_BKSD, values_BKSD, resident_BKS, scaling, with_weights)
    return out_BKGD, weights_BKGS if with_weights else None


def _like_decode(
    query: Tensor, keys: Tensor, values: Tensor, resident: Tensor, scaling: float, with_weights: bool
) -> tuple[Tensor, Tensor]:
    weights = floats(query, (*query.shape[:3], keys.shape[2])) if with_weights else query.new_empty(0)
    return query.new_empty(query.shape), weights


@operator("decode_attention", fake=_like_decode)
def _decode(
    query_BKGD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor, resident_BKS: Tensor, scaling: float,
    with_weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, and the softmax weights BKGS in float32, if they are wanted; else an empty tensor."""
    rows, heads, groups, _ = query_BKGD.shape
    nowhere = query_BKGD.new_zeros(rows, heads, dtype=torch.int64)
    slots = Slots(keys_BKSD, values_BKSD, resident_BKS.to(torch.int32) - 1, nowhere, nowhere[:, 0], 1)
    work = plan_work(query_BKGD, query_BKGD[:, :, 0], query_BKGD[:, :, 0], slots)
    logit = floats(query_BKGD, (rows, heads, groups, work.tokens)) if with_weights else query_BKGD
    side = SideOutput(score=2, combine=3) if with_weights else SideOutput()
    partial, share = split(work, slots, query_BKGD, logit, scaling, side)
    out = combine(work, slots, partial, share, logit, query_BKGD, query_BKGD, side)
    return out.to(query_BKGD.dtype), logit if with_weights else query_BKGD.new_empty(0)


def paged_attention(query_BKGD: Tensor, paged: PagedKV, scaling: float) -> Tensor:
    work, none = plan_work(query_BKGD, query_BKGD[:, :, 0], query_BKGD[:, :, 0], paged), query_BKGD
    partial, share = split(work, paged, none, none, scaling, SideOutput())
    return combine(work, paged, partial, share, none, none, none, SideOutput()).to(query_BKGD.dtype)


def plan_work(query: Tensor, key: Tensor, value: Tensor, cache: Slots | PagedKV) -> Work:
    """Cast the inputs and choose the number and size of splits."""
    if isinstance(cache, Slots):
        tokens, page_size = cache.keys_BKSD.shape[2], cache.page_size
        keys, values = cache.keys_BKSD, cache.values_BKSD
    else:
        page_size = cache.keys_XTKD.shape[1]
        tokens, keys, values = cache.block_BKP.shape[2] * page_size, cache.keys_XTKD, cache.values_XTKD
    assert keys.stride() == values.stride() and keys.stride(-1) == 1 and tokens % page_size == 0
    # Two tiles of keys and values in flight must fit in shared memory: 64 tokens up to 128 dimensions.
    block = max(page_size, 64 if query.shape[-1] <= 128 else 32)
    blocks = triton.cdiv(tokens, block)
    wanted = triton.cdiv(_processors(query.device) * PROGRAMS_PER_PROCESSOR, query.shape[0] * query.shape[1])
    per_split = triton.cdiv(blocks, min(blocks, wanted))
    # A tensor core takes one dtype: the query is cast to that of the cache.
    query, key, value = (x.to(keys.dtype).contiguous() for x in (query, key, value))
    splits = triton.cdiv(blocks, per_split)
    return Work(query, key, value, tokens, page_size, per_split * block, splits, block)


def split(
    work: Work, cache: Slots | PagedKV, score: Tensor, logit: Tensor, scaling: float, side: SideOutput,
    cap: Tensor | None = None, *, append: bool = False, attend: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the split kernel; with `cap`, it reads only that many pages per row, those with the best `score`.

    Returns the output of each split, and log2 of its softmax sum.
    """
    rows, heads, groups, dim = work.query.shape
    partial = floats(work.query, (rows, heads, work.splits, groups, dim))
    share = floats(work.query, (rows, heads, work.splits, groups))
    pages = work.tokens // work.page_size
    none = work.query
    if isinstance(cache, Slots):
        keys, values, position = cache.keys_BKSD, cache.values_BKSD, cache.position_BKS
        low, high = (none if x is None else x for x in (cache.kmin_BKPD, cache.kmax_BKPD))
        row, head, token, _ = keys.stride()
        strides = (row, head, token * work.page_size, token, *position.stride()[:2], *low.stride()[:3], 0)
        held = (keys, values, position, cache.tail_BK.contiguous(), cache.now_B, none, none, low, high)
    else:
        keys, values = cache.keys_XTKD, cache.values_XTKD
        low = high = none
        block, token, head, _ = keys.stride()
        per_row, per_table, _ = cache.block_BKP.stride()
        strides = (0, head, block, token, 0, per_table, 0, 0, 0, per_row)
        held = (keys, values, none, none, none, cache.block_BKP, cache.length_B, low, high)
    split_kernel[(rows * heads, work.splits)](
        work.query, work.key, work.value, *held, none if cap is None else cap, score, logit, partial, share,
        scaling * LOG2E, _log2(side.alpha), side.near, *strides,
        score.stride(1) if score is not none else 0, pages, work.tokens, work.split_tokens, heads,
        cache.tail_BK.shape[1] if isinstance(cache, Slots) else cache.block_BKP.shape[1],
        G=groups, D=dim, T=work.page_size, BLOCK_G=max(16, triton.next_power_of_2(groups)), BLOCK_S=work.block,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_P=1 if cap is None else triton.next_power_of_2(pages), TABLE=isinstance(cache, PagedKV),
        APPEND=append, BOUND=side.bound, SCORE=side.score, SELECT=cap is not None, ATTEND=attend,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return partial, share


def combine(
    work: Work, cache: Slots | PagedKV, partial: Tensor, share: Tensor, logit: Tensor, score: Tensor,
    result: Tensor, side: SideOutput,
) -> Tensor:  # fmt: skip
    """Launch the combine kernel: page scores go to `result`, weights replace the logits. Returns the output."""
    rows, heads, groups, dim = work.query.shape
    out = torch.empty_like(work.query)
    pages, kind = work.tokens // work.page_size, side.combine
    state = now = tail = work.query
    if kind >= 4:
        assert isinstance(cache, Slots) and side.state_BKS is not None and side.state_BKS.is_contiguous()
        assert cache.tail_BK.shape[1] == heads
        state, now, tail = side.state_BKS, cache.now_B, cache.tail_BK
    # The output is sliced into programs: one program per head would leave most of the GPU idle.
    slice_of = 32
    combine_kernel[(rows * heads, triton.cdiv(dim, slice_of))](
        partial, share, out, logit, score, result, state, now, tail,
        cache.length_B if isinstance(cache, PagedKV) else work.query, work.splits, work.tokens, pages, heads,
        side.alpha, _log2(side.alpha),
        G=groups, D=dim, T=work.page_size, BLOCK_G=triton.next_power_of_2(groups),
        BLOCK_C=triton.next_power_of_2(work.splits), BLOCK_D=slice_of,
        BLOCK_P=triton.next_power_of_2(pages) if kind == 2 else 1, BLOCK_N=128,
        TABLE=isinstance(cache, PagedKV), COMBINE=kind, num_warps=4,
    )  # fmt: skip
    return out


def floats(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _log2(alpha: float) -> float:
    return log2(alpha) if alpha > 0 else -inf


def _processors(device: torch.device) -> int:
    """Multiprocessors of the device; 2 on a CPU (Triton's interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
