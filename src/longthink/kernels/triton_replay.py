"""Tokens decoded again one after the other, in one launch: what a request had generated before it lost its blocks.

One program has a page table to itself, so the table stays in its registers from the first token to the last, and
nothing is launched between two tokens.

Shape suffixes: see `reference_replay`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longthink.kernels.reference_replay import Again
from longthink.kernels.triton_parts import attend_tile, dot, is_best, least_of_best, rank_key

_FAR = tl.constexpr(0x7FFFFFFF)
_LOG2E = 1.4426950408889634


@triton.jit
def _open(page, worth, tail, now, pinned, cap, T: tl.constexpr, P: tl.constexpr):
    """Slot of the page of the token at `now`: that of its page, the next empty one, or the one that gives way."""
    may = (page >= 0) & (page * T >= pinned)
    least = tl.min(tl.where(may, worth, _FAR), 0)
    victim = tl.argmin(tl.where(may & (worth == least), page, _FAR), 0)
    slot = tl.where(now // T < cap, now // T, victim)
    return tl.where(now % T == 0, slot, tail).to(tl.int32)


@triton.jit
def _widen(pointer, key, fresh, d, D: tl.constexpr, HIGH: tl.constexpr):
    """Widen one end of a representative; a page's first key starts it anew."""
    old = tl.load(pointer + d, mask=d < D, other=0.0)
    if HIGH:
        wide = tl.maximum(old, key, propagate_nan=tl.PropagateNan.ALL)
    else:
        wide = tl.minimum(old, key, propagate_nan=tl.PropagateNan.ALL)
    tl.store(pointer + d, tl.where(fresh, key, wide).to(old.dtype), mask=d < D)


@triton.jit
def _append(
    key, value, keys, values, low, high, token, offset, place, ends,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STAMP: tl.constexpr,
):  # fmt: skip
    """Write a head's key and value, and widen the representative of its page."""
    d = tl.arange(0, BLOCK_D)
    k = tl.load(key + token * D + d, mask=d < D, other=0.0)
    tl.store(keys + place + d, k, mask=d < D)
    tl.store(values + place + d, tl.load(value + token * D + d, mask=d < D, other=0.0), mask=d < D)
    if STAMP:
        _widen(low + ends, k, offset == 0, d, D, False)
        _widen(high + ends, k, offset == 0, d, D, True)


@triton.jit
def _attend(
    q, keys, values, block, tail, offset, used, stride_block, stride_token, scale,
    D: tl.constexpr, T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Softmax attention over the slots in use, of which the tail is filled up to `offset`."""
    d = tl.arange(0, BLOCK_D)
    top = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    out = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for begin in range(0, used * T, BLOCK_S):
        token = begin + tl.arange(0, BLOCK_S)
        slot, within = token // T, token % T
        held = (slot < used) & ((slot != tail) | (within <= offset))
        place = tl.load(block + slot, mask=held, other=0) * stride_block + within * stride_token
        real = held[:, None] & (d < D)[None, :]
        k = tl.load(keys + place[:, None] + d[None, :], mask=real, other=0.0)
        logits = tl.where(held[None, :], dot(q, tl.trans(k)) * scale, float("-inf"))
        v = tl.load(values + place[:, None] + d[None, :], mask=real, other=0.0)
        top, total, out = attend_tile(top, total, out, logits, v)
    return out / tl.where(total == 0, 1.0, total)[:, None]


@triton.jit
def _bounds(
    q, low, high, block, score, used, stride_block, first,
    G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Quest's bound of the pages in use, the maximum over the heads so far."""
    d, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    up, down = tl.maximum(q.to(tl.float32), 0.0), tl.minimum(q.to(tl.float32), 0.0)
    for begin in range(0, used, BLOCK_P):
        slot = begin + tl.arange(0, BLOCK_P)
        live = slot < used
        place = (tl.load(block + slot, mask=live, other=0) * stride_block)[:, None] + d[None, :]
        real = live[:, None] & (d < D)[None, :]
        highest = tl.load(high + place, mask=real, other=0.0)
        lowest = tl.load(low + place, mask=real, other=0.0)
        bound = dot(up.to(highest.dtype), tl.trans(highest)) + dot(down.to(lowest.dtype), tl.trans(lowest))
        bound = tl.where((g < G)[:, None], tl.where(bound != bound, float("inf"), bound), float("-inf"))
        before = tl.load(score + slot, mask=live & ~first, other=float("-inf"))
        tl.store(score + slot, tl.maximum(tl.max(bound, 0), before), mask=live)


@triton.jit
def _read(
    query, out, keys, values, low, high, table, score, token, first, tail, offset, used, kv_block, kv_token,
    low_block, scale, STAMP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention of the query heads of a KV head, and their bounds."""
    d, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    place = (token * G + g[:, None]) * D + d[None, :]
    real = (g < G)[:, None] & (d < D)[None, :]
    q = tl.load(query + place, mask=real, other=0.0)
    found = _attend(
        q, keys, values, table, tail, offset, used, kv_block, kv_token, scale, D, T, BLOCK_G, BLOCK_S, BLOCK_D
    )
    tl.store(out + place, found.to(out.dtype.element_ty), mask=real)
    if STAMP:
        _bounds(q, low, high, table, score, used, low_block, first, G, D, BLOCK_G, 16, BLOCK_D)
        # The next head, or the ranking, reads what other threads have written here.
        tl.debug_barrier()


@triton.jit
def _used(score, page, now, slots, FRACTION: tl.constexpr, P: tl.constexpr, T: tl.constexpr):
    """Pages that the token at `now` used: see `reference.stamp_used`."""
    slot = tl.arange(0, P)
    worth = tl.load(score + slot, mask=(slot < slots) & (page >= 0), other=float("-inf"))
    resident = tl.sum((page >= 0).to(tl.int32), 0)
    count = tl.ceil(resident.to(tl.float64) * FRACTION - 1e-9).to(tl.int32)
    key = tl.where(page >= 0, rank_key(worth), -1)
    least, last = least_of_best(key, page, count)
    best = is_best(key, page, least, last) & (count > 0)
    return (best | (page == now // T)) & (page >= 0)


@triton.jit
def replay_kernel(
    query, key, value, out, keys, values, low, high, position, stamp, table, score, start, first, count, prompt,
    cap, scale, slots, tables, kv_heads, kv_block, kv_token, kv_head, low_block, low_head, position_block,
    position_table, stamp_block, stamp_table,
    FRACTION: tl.constexpr, STAMP: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    T: tl.constexpr, P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All tokens of one row for one page table, which serves `HEADS` KV heads."""
    own = tl.program_id(0)
    row, mine = own // tables, own % tables
    slot, within = tl.arange(0, P), tl.arange(0, T)
    table += row.to(tl.int64) * slots
    score += own.to(tl.int64) * slots
    block = tl.load(table + slot, mask=slot < slots, other=0)
    begin, limit, pinned = tl.load(first + row), tl.load(cap + row), tl.load(prompt + row)
    at = block * position_block + mine * position_table
    filled = tl.minimum((begin + T - 1) // T, limit)
    held = tl.load(position + at[:, None] + within[None, :], mask=(slot < filled)[:, None], other=-1)
    page = tl.max(held, 1)
    page = tl.where(page < 0, -1, page // T)
    stamps = page
    if STAMP:
        stamps = tl.load(stamp + block * stamp_block + mine * stamp_table, mask=slot < filled, other=0)
    tail = tl.argmax((page == begin // T).to(tl.int32), 0)
    tokens = tl.load(count + row)
    for i in range(tokens):
        now = begin + i
        tail = _open(page, stamps if STAMP else page, tail, now, pinned, limit, T, P)
        here = slot == tail
        page = tl.where(here, now // T, page).to(tl.int32)
        used = tl.minimum(now // T + 1, limit)
        tail_block = tl.sum(tl.where(here, block, 0), 0)
        token = (tl.load(start + row) + i).to(tl.int64)
        for h in range(HEADS):
            head = mine * HEADS + h
            _append(
                key, value, keys, values, low, high, token * kv_heads + head, now % T,
                tail_block * kv_block + (now % T) * kv_token + head * kv_head,
                tail_block * low_block + head * low_head, D, BLOCK_D, STAMP,
            )  # fmt: skip
        # What other threads have written must be there.
        tl.debug_barrier()
        for h in range(HEADS):
            head = mine * HEADS + h
            _read(
                query, out, keys + head * kv_head, values + head * kv_head, low + head * low_head,
                high + head * low_head, table, score, token * kv_heads + head, h == 0, tail, now % T, used,
                kv_block, kv_token, low_block, scale, STAMP, G, D, T, BLOCK_G, BLOCK_S, BLOCK_D,
            )  # fmt: skip
        if STAMP:
            stamps = tl.where(_used(score, page, now, slots, FRACTION, P, T), now, stamps).to(tl.int32)
        # The next token may take the place of one that others still read.
        tl.debug_barrier()
    last = begin + tokens - 1
    held = page[:, None] * T + within[None, :]
    held = tl.where((page[:, None] >= 0) & (held <= last), held, -1)
    changed = (slot < tl.minimum(last // T + 1, limit)) & (tokens > 0)
    tl.store(position + at[:, None] + within[None, :], held, mask=changed[:, None])
    if STAMP:
        tl.store(stamp + block * stamp_block + mine * stamp_table, stamps, mask=changed)


def replay(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, out_NHD: Tensor, again: Again, scaling: float
) -> None:
    """One launch: see `reference_replay.replay`."""
    rows, slots = again.block_BP.shape
    _, tables, page_size = again.position_XKT.shape
    kv_heads, dim = key_NKD.shape[1:]
    groups = query_NHD.shape[1] // kv_heads
    stamps = again.stamp_XK1 is not None
    none = query_NHD
    low, high, stamp = (none if x is None else x for x in (again.kmin_XKD, again.kmax_XKD, again.stamp_XK1))
    query, key, value = (x.to(again.keys_XTKD.dtype).contiguous() for x in (query_NHD, key_NKD, value_NKD))
    score = torch.empty(rows * tables, slots, dtype=torch.float32, device=query.device)
    block, token, head, _ = again.keys_XTKD.stride()
    assert again.values_XTKD.stride() == again.keys_XTKD.stride() and out_NHD.is_contiguous()
    replay_kernel[(rows * tables,)](
        query, key, value, out_NHD, again.keys_XTKD, again.values_XTKD, low, high, again.position_XKT, stamp,
        again.block_BP.contiguous(), score, again.start_B, again.first_B, again.count_B, again.pinned_B,
        again.cap_B, scaling * _LOG2E, slots, tables, kv_heads, block, token, head,
        *(low.stride()[:2] if stamps else (0, 0)), *again.position_XKT.stride()[:2],
        *(stamp.stride()[:2] if stamps else (0, 0)),
        FRACTION=again.r, STAMP=stamps, HEADS=kv_heads // tables, G=groups, D=dim, T=page_size,
        P=triton.next_power_of_2(slots), BLOCK_G=max(16, triton.next_power_of_2(groups)),
        BLOCK_S=max(page_size, 64 if dim <= 128 else 32), BLOCK_D=max(16, triton.next_power_of_2(dim)),
        num_warps=4,
    )  # fmt: skip
