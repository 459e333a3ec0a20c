"""The fused attention of `reference_step` on the GPU: two kernels a layer and step (three for `select_attention`).

Shape suffixes: see `reference_step`; C splits.
"""

from __future__ import annotations

from functools import cache as remember
from math import inf, log2
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from longthink.kernels.reference_step import Learn, Pool, Slots
from longthink.kernels.triton_attention import split_kernel
from longthink.kernels.triton_combine import combine_kernel

LOG2E = 1.4426950408889634
PROGRAMS_PER_PROCESSOR = 4
"""Split programs that a multiprocessor shall have: enough to hide the latency of memory."""

_SCORE = {"mass": 1, "weights": 2, "heavy": 2, "marks": 3}
_BOUND = {"bound": 1, "bound_share": 2}
_COMBINE = {"mass": 1, "bound_share": 2, "weights": 3, "marks": 4, "heavy": 5}


class _Work(NamedTuple):
    """Tensors of one layer's step as the kernels want them, and how the tokens are split."""

    query: Tensor
    key: Tensor
    value: Tensor
    tokens: int
    page_size: int
    split_tokens: int
    splits: int
    block: int


def step_attention(
    query_BKGD: Tensor,
    key_BKD: Tensor,
    value_BKD: Tensor,
    cache: Slots | Pool,
    scaling: float,
    learn: Learn | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Append, attention and learning in two launches: see `reference_step.step_attention`."""
    learn = Learn() if learn is None else learn
    work = _work(query_BKGD, key_BKD, value_BKD, cache)
    rows, heads, groups, _ = query_BKGD.shape
    pages, kind = work.tokens // work.page_size, learn.kind
    assert kind not in ("marks", "heavy") or (isinstance(cache, Slots) and learn.state_BKS is not None)
    per_page = learn.score_BKP
    if per_page is None and kind in ("mass", *_BOUND):
        per_page = _floats(query_BKGD, (rows, heads, pages))
    score = query_BKGD if per_page is None else per_page
    if kind in ("mass", "marks", "bound_share"):
        score = _floats(query_BKGD, (rows, heads, groups, pages))
    logit = _floats(query_BKGD, (rows, heads, groups, work.tokens)) if _SCORE.get(kind, 0) > 1 else query_BKGD
    partial, share = _split(
        work, cache, score, logit, scaling, learn, APPEND=True, BOUND=_BOUND.get(kind, 0),
        SCORE=_SCORE.get(kind, 0), SELECT=False, ATTEND=True,
    )  # fmt: skip
    result = score if per_page is None else per_page
    out = _combine(work, cache, partial, share, logit, score, result, learn)
    return out.to(query_BKGD.dtype), logit if kind == "weights" else per_page


def select_attention(
    query_BKGD: Tensor, key_BKD: Tensor, value_BKD: Tensor, slots: Slots, cap_B: Tensor, scaling: float
) -> Tensor:
    """Append and bounds, then attention over the best pages, in three launches: see `reference_step`."""
    work = _work(query_BKGD, key_BKD, value_BKD, slots)
    score = _floats(query_BKGD, (*query_BKGD.shape[:2], work.tokens // work.page_size))
    given = work, slots, score, score, scaling, Learn(), cap_B
    _split(*given, SCORE=0, APPEND=True, BOUND=1, SELECT=False, ATTEND=False)
    partial, share = _split(*given, SCORE=0, APPEND=False, BOUND=0, SELECT=True, ATTEND=True)
    return _combine(work, slots, partial, share, score, score, score, Learn()).to(query_BKGD.dtype)


def decode_attention(
    query_BKGD: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    resident_BKS: Tensor,
    scaling: float,
    *,
    with_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention without an append: see `reference.decode_attention`."""
    rows, heads, groups, _ = query_BKGD.shape
    nobody = query_BKGD.new_zeros(rows, heads, dtype=torch.int64)
    slots = Slots(keys_BKSD, values_BKSD, resident_BKS.to(torch.int32) - 1, nobody, nobody[:, 0], 1)
    work = _work(query_BKGD, query_BKGD[:, :, 0], query_BKGD[:, :, 0], slots)
    logit = _floats(query_BKGD, (rows, heads, groups, work.tokens)) if with_weights else query_BKGD
    partial, share = _split(
        work, slots, query_BKGD, logit, scaling, Learn(), APPEND=False, BOUND=0, SCORE=2 * with_weights, SELECT=False,
        ATTEND=True,
    )  # fmt: skip
    learn = Learn("weights" if with_weights else "nothing")
    out = _combine(work, slots, partial, share, logit, query_BKGD, query_BKGD, learn)
    return out.to(query_BKGD.dtype), logit if with_weights else None


def _work(query: Tensor, key: Tensor, value: Tensor, cache: Slots | Pool) -> _Work:
    if isinstance(cache, Slots):
        tokens, page_size = cache.keys_BKSD.shape[2], cache.page_size
        keys, values = cache.keys_BKSD, cache.values_BKSD
    else:
        page_size = cache.keys_XTKD.shape[1]
        tokens, keys, values = cache.block_BKP.shape[2] * page_size, cache.keys_XTKD, cache.values_XTKD
    assert keys.stride() == values.stride() and keys.stride(-1) == 1 and tokens % page_size == 0
    # Two tiles of keys and values in flight fit in shared memory: 64 tokens up to 128 dimensions.
    block = max(page_size, 64 if query.shape[-1] <= 128 else 32)
    blocks = triton.cdiv(tokens, block)
    wanted = triton.cdiv(_processors(query.device) * PROGRAMS_PER_PROCESSOR, query.shape[0] * query.shape[1])
    per_split = triton.cdiv(blocks, min(blocks, wanted))
    # Where the cache is narrower than the model, the query is narrowed: a tensor core takes one format.
    query, key, value = (x.to(keys.dtype).contiguous() for x in (query, key, value))
    splits = triton.cdiv(blocks, per_split)
    return _Work(query, key, value, tokens, page_size, per_split * block, splits, block)


def _split(
    work: _Work,
    cache: Slots | Pool,
    score: Tensor,
    logit: Tensor,
    scaling: float,
    learn: Learn,
    cap: Tensor | None = None,
    **flags: Any,
) -> tuple[Tensor, Tensor]:
    rows, heads, groups, dim = work.query.shape
    partial = _floats(work.query, (rows, heads, work.splits, groups, dim))
    share = _floats(work.query, (rows, heads, work.splits, groups))
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
        low, high = (none if x is None else x for x in (cache.kmin_XKD, cache.kmax_XKD))
        block, token, head, _ = keys.stride()
        low_block, low_head = low.stride()[:2]
        per_row, per_table, _ = cache.block_BKP.stride()
        strides = (0, head, block, token, 0, per_table, 0, low_head, low_block, per_row)
        held = (keys, values, none, none, none, cache.block_BKP, cache.length_B, low, high)
    split_kernel[(rows * heads, work.splits)](
        work.query, work.key, work.value, *held, none if cap is None else cap, score, logit, partial, share,
        scaling * LOG2E, _log2(learn.alpha), learn.near, *strides,
        score.stride(1) if score is not none else 0, pages, work.tokens, work.split_tokens, heads,
        cache.tail_BK.shape[1] if isinstance(cache, Slots) else cache.block_BKP.shape[1],
        G=groups, D=dim, T=work.page_size, BLOCK_G=max(16, triton.next_power_of_2(groups)), BLOCK_S=work.block,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_P=triton.next_power_of_2(pages) if flags["SELECT"] else 1,
        TABLE=isinstance(cache, Pool), num_warps=4, num_stages=2, **flags,
    )  # fmt: skip
    return partial, share


def _combine(
    work: _Work,
    cache: Slots | Pool,
    partial: Tensor,
    share: Tensor,
    logit: Tensor,
    score: Tensor,
    result: Tensor,
    learn: Learn,
) -> Tensor:
    rows, heads, groups, dim = work.query.shape
    out = torch.empty_like(work.query)
    pages, kind = work.tokens // work.page_size, _COMBINE.get(learn.kind, 0)
    state = now = tail = work.query
    if kind >= 4:
        assert isinstance(cache, Slots) and learn.state_BKS is not None and learn.state_BKS.is_contiguous()
        assert cache.tail_BK.shape[1] == heads
        state, now, tail = learn.state_BKS, cache.now_B, cache.tail_BK
    # Slices of the output are programs of their own: one program a head would leave most of the GPU idle.
    slice_of = 32
    combine_kernel[(rows * heads, triton.cdiv(dim, slice_of))](
        partial, share, out, logit, score, result, state, now, tail,
        cache.length_B if isinstance(cache, Pool) else work.query, work.splits, work.tokens, pages, heads,
        learn.alpha, _log2(learn.alpha),
        G=groups, D=dim, T=work.page_size, BLOCK_G=triton.next_power_of_2(groups),
        BLOCK_C=triton.next_power_of_2(work.splits), BLOCK_D=slice_of,
        BLOCK_P=triton.next_power_of_2(pages) if kind == 2 else 1, BLOCK_N=128,
        TABLE=isinstance(cache, Pool), LEARN=kind, num_warps=4,
    )  # fmt: skip
    return out


def _floats(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _log2(alpha: float) -> float:
    return log2(alpha) if alpha > 0 else -inf


@remember
def _processors(device: torch.device) -> int:
    """Multiprocessors of the device; a CPU, where only Triton's interpreter runs, counts as a small one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
