"""Split-KV decode attention in Triton; `triton_decode` launches it.

A program serves one row, one KV head with its group of query heads, and a range of pages. The same code reads page
slots and block pools, which differ only in the address of a page. Logits are in base 2.

Shape suffixes: see `reference`; C splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longthink.kernels.triton_parts import (
    MARGIN_LOG2,
    attend_tile,
    dot,
    group_max,
    is_best,
    least_of_best,
    rank_key,
)


@triton.jit
def _new_token(row, table, tables, length, tail, now, T: tl.constexpr, TABLE: tl.constexpr):
    """Token slot and position of the new token."""
    if TABLE:
        position = tl.load(length + row).to(tl.int32) - 1
        token = position
    else:
        position = tl.load(now + row).to(tl.int32)
        token = tl.load(tail + row * tables + table).to(tl.int32) * T + position % T
    return token, position


@triton.jit
def _page_place(page, live, row, table, table_row, page_stride, TABLE: tl.constexpr):
    """Offsets of pages, in elements from the start of the row and head."""
    if TABLE:
        page = tl.load(table + row * table_row + page, mask=live, other=0)
    return page.to(tl.int64) * page_stride


@triton.jit
def _append(
    keys, values, place, key, value, position, token, now, writes_position,
    T: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the new token and clear the positions behind it in its page."""
    d = tl.arange(0, BLOCK_D)
    tl.store(keys + place + d, key, mask=d < D)
    tl.store(values + place + d, value, mask=d < D)
    t = tl.arange(0, T)
    within = token % T
    tl.store(
        position + token - within + t, tl.where(t == within, now, -1), mask=(t >= within) & writes_position
    )


@triton.jit
def _key_bounds(pointer, place, is_tail, fresh, key, live, d, D: tl.constexpr, HIGH: tl.constexpr):
    """Load key bounds of pages; those of the tail are extended by the new key and stored."""
    real = live[:, None] & (d < D)[None, :]
    found, new = (
        tl.load(pointer + place[:, None] + d[None, :], mask=real, other=0.0),
        key.to(tl.float32)[None, :],
    )
    if HIGH:
        wide = tl.maximum(found.to(tl.float32), new, propagate_nan=tl.PropagateNan.ALL)
    else:
        wide = tl.minimum(found.to(tl.float32), new, propagate_nan=tl.PropagateNan.ALL)
    wide = tl.where(fresh, new, wide).to(found.dtype)
    tl.store(pointer + place[:, None] + d[None, :], wide, mask=real & is_tail[:, None])
    return tl.where(is_tail[:, None], wide, found)


@triton.jit
def _bounds(
    query, key, kmin, kmax, position, score, score_stride, first, last, tail_page, fresh, low_page, scale,
    G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Quest's bound of the pages from `first` to `last`, after extending the bounds of the tail."""
    d, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    # Without `propagate_nan` a GPU, unlike Triton's interpreter, takes 0 for the larger of NaN and 0.
    up = tl.maximum(query.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
    down = tl.minimum(query.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
    for start in range(first, last, BLOCK_P):
        page = start + tl.arange(0, BLOCK_P)
        live = page < last
        place = page.to(tl.int64) * low_page
        is_tail = page == tail_page
        low = _key_bounds(kmin, place, is_tail, fresh, key, live, d, D, False)
        high = _key_bounds(kmax, place, is_tail, fresh, key, live, d, D, True)
        bound = dot(up.to(high.dtype), tl.trans(high))
        bound += dot(down.to(low.dtype), tl.trans(low))
        held = page[:, None] * T + tl.arange(0, T)[None, :]
        held = tl.load(position + held, mask=live[:, None], other=-1)
        has = (tl.max(held, 1) >= 0) | is_tail
        bound = tl.where(has[None, :] & (g < G)[:, None], bound, float("-inf"))
        if BOUND == 1:
            tl.store(score + page, group_max(bound), mask=live)
        else:
            where = score + g[:, None] * score_stride + page[None, :]
            tl.store(where, bound * scale, mask=(g < G)[:, None] & live[None, :])


@triton.jit
def _page_scores(
    logits, total, far, token, start, end, score, score_stride, logit, tokens, log2_alpha,
    G: tl.constexpr, T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """Store what the combine kernel needs: page sums, all logits, or logits of pages that may exceed alpha.

    `total` is log2 of the running sum, so a share of it is never less than the final share.
    """
    g = tl.arange(0, BLOCK_G)
    inside = (g < G)[:, None] & ((token >= start) & (token < end))[None, :]
    where = logit + g[:, None] * tokens + token[None, :]
    if SCORE == 2:
        tl.store(where, logits, mask=inside)
    else:
        PAGES: tl.constexpr = BLOCK_S // T
        page = tl.min(tl.reshape(token, (PAGES, T)), 1) // T
        live = (g < G)[:, None] & (page * T < end)[None, :]
        kept = tl.where(far[None, :], logits, float("-inf")) if SCORE == 3 else logits
        paged = tl.reshape(kept, (BLOCK_G, PAGES, T))
        top = tl.max(paged, 2)
        if SCORE == 1:
            safe = tl.where(top == float("-inf"), 0.0, top)
            found = safe + tl.log2(tl.sum(tl.exp2(paged - safe[:, :, None]), 2))
        else:
            found = top
            may = top > total[:, None] + log2_alpha - 2 * MARGIN_LOG2
            may = tl.reshape(tl.broadcast_to(may[:, :, None], (BLOCK_G, PAGES, T)), (BLOCK_G, BLOCK_S))
            tl.store(where, kept, mask=inside & may)
        tl.store(score + g[:, None] * score_stride + page[None, :], found, mask=live)


@triton.jit
def _chosen(score, position, count, tail_page, pages, T: tl.constexpr, BLOCK_P: tl.constexpr):
    """Threshold for `is_best`: the tail and the best resident pages, `count` in all."""
    page = tl.arange(0, BLOCK_P)
    live = page < pages
    bound = tl.load(score + page, mask=live, other=0.0)
    resident = tl.load(position + page * T, mask=live, other=-1) >= 0
    bound = tl.where(page == tail_page, float("inf"), bound)
    return least_of_best(tl.where(resident, rank_key(bound), -1), page, count)


@triton.jit
def _attend(
    query, key, value, keys, values, position, table, score, score_stride, logit, token_new, now, least, last,
    start, end, row, table_row, kv_page, kv_token, tokens, scale, log2_alpha, near,
    G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, TABLE: tl.constexpr, APPEND: tl.constexpr, SCORE: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """Softmax attention over the tokens from `start` to `end`: output, and log2 of the sum."""
    d = tl.arange(0, BLOCK_D)
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    out = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    if TABLE:
        end = tl.minimum(end, token_new + 1)
    for begin in range(start, end, BLOCK_S):
        token = begin + tl.arange(0, BLOCK_S)
        page, live = token // T, token < end
        is_new = live & (token == token_new) & APPEND
        if TABLE:
            resident, held = live & (token <= token_new), token
        else:
            held = tl.load(position + token, mask=live, other=-1)
            # Tokens behind the new one in its page are stale, whether or not another program has cleared them.
            resident = (held >= 0) & ~((page == token_new // T) & (token > token_new) & APPEND)
        if SELECT:
            bound = tl.load(score + page, mask=live, other=0.0)
            bound = tl.where(page == token_new // T, float("inf"), bound)
            resident = resident & is_best(rank_key(bound), page, least, last)
        resident = resident | is_new
        old = (resident & ~is_new)[:, None] & (d < D)[None, :]
        place = _page_place(page, live, row, table, table_row, kv_page, TABLE) + (token % T) * kv_token
        k = tl.load(keys + place[:, None] + d[None, :], mask=old, other=0.0)
        k = tl.where(is_new[:, None], key[None, :], k)
        logits = tl.where(resident[None, :], dot(query, tl.trans(k)) * scale, float("-inf"))
        v = tl.load(values + place[:, None] + d[None, :], mask=old, other=0.0)
        v = tl.where(is_new[:, None], value[None, :], v)
        top, total, out = attend_tile(top, total, out, logits, v)
        if SCORE > 0:
            # The position at the new token's slot may still be that of its predecessor.
            far = resident & ~is_new & (held < now - near)
            _page_scores(
                logits, top + tl.log2(total), far, token, start, end, score, score_stride, logit, tokens,
                log2_alpha, G, T, BLOCK_G, BLOCK_S, SCORE,
            )  # fmt: skip
    return out / tl.where(total == 0, 1.0, total)[:, None], top + tl.log2(total)


@triton.jit
def split_kernel(
    query, key, value, keys, values, position, tail, now, table, length, kmin, kmax, cap,
    score, logit, partial, share, scale, log2_alpha, near,
    kv_row, kv_head, kv_page, kv_token, position_row, own_table, low_row, low_head, low_page, table_row,
    score_row, score_stride, tokens, split_tokens, heads, tables,
    G: tl.constexpr, D: tl.constexpr, T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, TABLE: tl.constexpr, APPEND: tl.constexpr, BOUND: tl.constexpr,
    SCORE: tl.constexpr, SELECT: tl.constexpr, ATTEND: tl.constexpr,
):  # fmt: skip
    """One row, KV head and split; see `triton_decode.split`. With TABLE it only reads."""
    row, head, split = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1)
    own = head * tables // heads
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    begin = tl.program_id(0).to(tl.int64)
    q = tl.load(
        query + (begin * G + g[:, None]) * D + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0
    )
    k = tl.load(key + begin * D + d, mask=d < D, other=0.0)
    v = tl.load(value + begin * D + d, mask=d < D, other=0.0)
    token_new, position_new = _new_token(row, own, tables, length, tail, now, T, TABLE)
    start = split * split_tokens
    end = tl.minimum(start + split_tokens, tokens)
    score += begin * score_row
    position += row.to(tl.int64) * position_row + own * own_table
    if TABLE:
        table += own * own_table
    base = row.to(tl.int64) * kv_row + head * kv_head
    if (token_new >= start) & (token_new < end) & APPEND:
        place = base + (token_new // T).to(tl.int64) * kv_page + (token_new % T) * kv_token
        _append(
            keys, values, place, k, v, position, token_new, position_new, (head + 1) * tables % heads == 0,
            T, D, BLOCK_D,
        )  # fmt: skip
    if BOUND > 0:
        low = row.to(tl.int64) * low_row + head * low_head
        _bounds(
            q, k, kmin + low, kmax + low, position, score, score_stride, start // T, tl.cdiv(end, T),
            token_new // T, token_new % T == 0, low_page, scale, G, D, T, BLOCK_G, 16, BLOCK_D, BOUND,
        )  # fmt: skip
    if ATTEND:
        least, last = tl.zeros((), tl.int64), tl.zeros((), tl.int32)
        if SELECT:
            least, last = _chosen(
                score, position, tl.load(cap + row), token_new // T, tokens // T, T, BLOCK_P
            )
        out, total = _attend(
            q, k, v, keys + base, values + base, position, table, score, score_stride,
            logit + begin * G * tokens, token_new, position_new, least, last, start, end, row, table_row,
            kv_page, kv_token, tokens, scale, log2_alpha, near, G, D, T, BLOCK_G, BLOCK_S, BLOCK_D, TABLE, APPEND,
            SCORE, SELECT,
        )  # fmt: skip
        slot = (begin * tl.num_programs(1) + split) * G + g
        tl.store(share + slot, total, mask=g < G)
        tl.store(partial + slot[:, None] * D + d[None, :], out, mask=(g < G)[:, None] & (d < D)[None, :])
