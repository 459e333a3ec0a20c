"""Combine the splits of split-KV attention, and turn logits into shares of the attention, in Triton.

Shape suffixes: see `reference`; C splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longthink.kernels.triton_parts import MARGIN_LOG2, group_max


@triton.jit
def _log2_sum(logits):
    """log2 of the sum of 2**x over the last dimension; 0 if there are no terms, so that their shares are 0."""
    top = tl.max(logits, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(logits - top[:, None]), 1)
    return tl.where(total == 0, 0.0, top + tl.log2(total))


@triton.jit
def _pages_total(score, pages, has, G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr):
    """log2 of the sum of 2**score over all pages, per query head."""
    g, p = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    live = (g < G)[:, None] & (p < has)[None, :]
    return _log2_sum(tl.load(score + g[:, None] * pages + p[None, :], mask=live, other=float("-inf")))


@triton.jit
def _token_states(
    state, now, tail, logit, score, total, count, first, step, alpha, log2_alpha, pages,
    G: tl.constexpr, T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """Mark tokens whose weight exceeds alpha (COMBINE 4) or sum the weights (5); a new page starts from 0.

    For 4, logits are stored only in pages that may exceed alpha, and are -inf at tokens that are near.
    """
    g = tl.arange(0, BLOCK_G)
    for start in range(first, count, step):
        token = start + tl.arange(0, BLOCK_N)
        live, page = token < count, token // T
        opened = live & (page == tail) & (now % T == 0)
        where = logit + g[:, None] * count + token[None, :]
        read = live[None, :] & (g < G)[:, None]
        if COMBINE == 4:
            top = tl.load(score + g[:, None] * pages + page[None, :], mask=read, other=float("-inf"))
            read = read & (top > total[:, None] + log2_alpha - MARGIN_LOG2)
            weight = tl.exp2(tl.load(where, mask=read, other=float("-inf")) - total[:, None])
            above = group_max(weight) > alpha
            tl.store(state + token, above.to(tl.int8), mask=above | opened)
        else:
            weight = tl.exp2(tl.load(where, mask=read, other=float("-inf")) - total[:, None])
            old = tl.load(state + token, mask=live & ~opened, other=0.0)
            tl.store(state + token, old + tl.sum(weight, 0), mask=live)


@triton.jit
def combine_kernel(
    partial, share, out, logit, score, result, state, now, tail, length, splits, tokens, pages, heads,
    alpha, log2_alpha,
    G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, TABLE: tl.constexpr,
    COMBINE: tl.constexpr,
):  # fmt: skip
    """One row and KV head, and a slice of its output and of its pages or tokens.

    COMBINE: see `triton_decode.SideOutput`.
    """
    begin, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    g, c, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_C), part * BLOCK_D + tl.arange(0, BLOCK_D)
    share += begin * splits * G
    live = (g < G)[:, None] & (c < splits)[None, :]
    total = _log2_sum(tl.load(share + c[None, :] * G + g[:, None], mask=live, other=float("-inf")))
    sums = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    real = (g < G)[:, None] & (d < D)[None, :]
    for split in range(splits):
        weight = tl.exp2(tl.load(share + split * G + g, mask=g < G, other=float("-inf")) - total)
        slot = (begin * splits + split) * G + g
        sums += weight[:, None] * tl.load(partial + slot[:, None] * D + d[None, :], mask=real, other=0.0)
    tl.store(out + (begin * G + g[:, None]) * D + d[None, :], sums, mask=real)
    logit += begin * G * tokens
    score += begin * G * pages
    first, step = part * BLOCK_N, parts * BLOCK_N
    # Beyond a row's last token no score was written.
    has = tl.minimum(tl.load(length + begin // heads).to(tl.int32), tokens) if TABLE else tokens
    if COMBINE == 1 or COMBINE == 2:
        if COMBINE == 2:
            total = _pages_total(score, pages, tl.cdiv(has, T), G, BLOCK_G, BLOCK_P)
        for start in range(first, pages, step):
            page = start + tl.arange(0, BLOCK_N)
            seen = (g < G)[:, None] & (page * T < has)[None, :]
            found = tl.load(score + g[:, None] * pages + page[None, :], mask=seen, other=float("-inf"))
            shares = tl.where(seen, tl.exp2(found - total[:, None]), 0.0)
            tl.store(result + begin * pages + page, group_max(shares), mask=page < pages)
    if COMBINE == 3:
        for start in range(first, tokens, step):
            token = start + tl.arange(0, BLOCK_N)
            mine = (g < G)[:, None] & (token < tokens)[None, :]
            where = logit + g[:, None] * tokens + token[None, :]
            found = tl.load(where, mask=mine & (token < has)[None, :], other=float("-inf"))
            tl.store(where, tl.exp2(found - total[:, None]), mask=mine)
    if COMBINE >= 4:
        _token_states(
            state + begin * tokens, tl.load(now + begin // heads).to(tl.int32),
            tl.load(tail + begin).to(tl.int32), logit, score, total, tokens, first, step, alpha, log2_alpha, pages,
            G, T, BLOCK_G, BLOCK_N, COMBINE,
        )  # fmt: skip
