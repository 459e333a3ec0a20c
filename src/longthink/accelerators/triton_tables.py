"""Page tables of all layers in one Triton launch: stamps and evictions; and the token moves of a layer.

Shape suffixes: N rows of all layers (layer after layer), B batch rows, K KV heads (1 where a table serves the whole
layer), P page slots, M tokens moved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longthink.accelerators.layers import EvictionRule, StampRule
from longthink.cache.store import SlotStore
from longthink.kernels.triton_parts import is_best, least_of_best, rank_key
from longthink.policies import Moves

_FAR = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _pages(position, slots, P: tl.constexpr, T: tl.constexpr):
    """Logical page in each slot, -1 where empty."""
    token = tl.arange(0, P)[:, None] * T + tl.arange(0, T)[None, :]
    held = tl.max(tl.load(position + token, mask=(tl.arange(0, P) < slots)[:, None], other=-1), 1)
    return tl.where(held < 0, -1, held // T)


@triton.jit
def _stamp(
    stamp, score, page, now, slots, shared, alpha, FRACTION: tl.constexpr, P: tl.constexpr, T: tl.constexpr
):
    """Stamp the used pages with `now`: see `RaaS.stamp`. A negative FRACTION selects by alpha."""
    slot = tl.arange(0, P)
    worth = tl.load(score + slot, mask=slot < slots, other=float("-inf"))
    for head in range(1, shared):
        more = tl.load(score + head * slots + slot, mask=slot < slots, other=float("-inf"))
        worth = tl.maximum(worth, more, propagate_nan=tl.PropagateNan.ALL)
    if FRACTION < 0:
        used = worth > alpha
    else:
        resident = tl.sum((page >= 0).to(tl.int32), 0)
        count = tl.ceil(resident.to(tl.float64) * FRACTION - 1e-9).to(tl.int32)
        key = tl.where(page >= 0, rank_key(worth), -1)
        least, last = least_of_best(key, page, count)
        used = is_best(key, page, least, last) & (count > 0)
    used = (used | (page == now // T)) & (page >= 0)
    tl.store(stamp + slot, (slot * 0 + now).to(tl.int32), mask=used)
    old = tl.load(stamp + slot, mask=(slot < slots) & ~used, other=0)
    return tl.where(used, now, old)


@triton.jit
def evict_kernel(
    position, tail, full, now, prompt, cap, pinned, recent, kept, worths, stamp, score,
    rows, tables, slots, shared, alpha,
    FRACTION: tl.constexpr, P: tl.constexpr, T: tl.constexpr, STAMP: tl.constexpr, WORTH: tl.constexpr,
    RECENT: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """One page table of one row and layer. WORTH: 0 the page number, 1 a tensor, 2 the stamps just set."""
    own = tl.program_id(0).to(tl.int64)
    row = own // tables % rows
    slot = tl.arange(0, P)
    page = _pages(position + own * slots * T, slots, P, T)
    new = tl.load(now + row).to(tl.int32)
    worth = page
    if STAMP:
        at = own * slots
        stamps = _stamp(stamp + at, score + at * shared, page, new - 1, slots, shared, alpha, FRACTION, P, T)
        if WORTH == 2:
            worth = stamps
    if WORTH == 1:
        worth = tl.load(worths + own * slots + slot, mask=slot < slots, other=0)
    may = (page >= 0) & (page * T >= tl.load(pinned + row))
    if RECENT:
        may = may & (page <= new // T - tl.load(recent + row))
    if KEPT:
        behind = slot - (tl.load(prompt + row) + T - 1) // T
        may = may & ((behind < 0) | (behind >= tl.load(kept + row)))
    if worth.dtype.is_floating():
        worth = tl.where(worth != worth, float("-inf"), worth)
        least = tl.min(tl.where(may, worth, float("inf")), 0)
    else:
        least = tl.min(tl.where(may, worth, _FAR), 0)
    oldest = tl.where(may & (worth == least), page, _FAR)
    evicted = tl.argmin(oldest, 0)
    held = tl.sum((page >= 0).to(tl.int32), 0)
    empty = tl.argmax(((page < 0) & (slot < slots)).to(tl.int32), 0)
    is_full = held >= tl.load(cap + row)
    opens = new % T == 0
    tl.store(tail + own, tl.where(is_full, evicted, empty).to(tl.int64), mask=opens)
    tl.store(full + own, (is_full & opens).to(tl.int8))


@triton.jit
def move_kernel(
    keys, values, position, state, source, target, tokens, heads, tables, states, moves,
    D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row and KV head: all reads precede the writes."""
    own = tl.program_id(0).to(tl.int64)
    row, head = own // heads, own % heads
    table = row * tables + head * tables // heads
    m, d = tl.arange(0, M), tl.arange(0, BLOCK_D)
    pair = m < moves
    old = tl.load(source + table * moves + m, mask=pair, other=0)
    new = tl.load(target + table * moves + m, mask=pair, other=0)
    moved = pair & (old != new)
    real = moved[:, None] & (d < D)[None, :]
    from_, to = (own * tokens + old)[:, None] * D + d[None, :], (own * tokens + new)[:, None] * D + d[None, :]
    tl.store(keys + to, tl.load(keys + from_, mask=real, other=0.0), mask=real)
    tl.store(values + to, tl.load(values + from_, mask=real, other=0.0), mask=real)
    # A table shared by the heads of a layer is written by the first of them.
    moved = moved & (table * heads == row * tables * heads + head * tables)
    at = position + table * tokens
    place = tl.load(at + old, mask=moved, other=-1)
    tl.store(at + old, place * 0 - 1, mask=moved)
    tl.store(at + new, place, mask=moved)
    at = state + table * tokens
    tl.store(at + new, tl.load(at + old, mask=moved, other=0), mask=moved)


def evict(
    whole: SlotStore, first: SlotStore, eviction: EvictionRule, stamping: StampRule | None = None
) -> Tensor:
    """Between two steps: stamp the pages that the last one used, and choose the slot of the next page.

    Where the next token opens a page, the tail becomes the first empty slot or, at the cap, the slot of the evicted
    page, which keeps its contents until the token is written. `whole` holds the page tables of all layers,
    contiguous; what all layers share is read from `first`. Returns NK, True where a page is evicted.
    """
    table, position_NKS = first.table, whole.table.position_BKS
    rows, (_, tables, tokens) = len(table.now_B), position_NKS.shape
    slots, none = tokens // table.page_size, position_NKS
    full_NK = torch.empty_like(whole.tail_BK, dtype=torch.bool)
    stamp, score = (none, none) if stamping is None else (stamping.stamp_NKP, stamping.score_NKP)
    fraction = -1.0 if stamping is None or stamping.r is None else stamping.r
    by_stamp = stamping is not None and eviction.worth_NKP is stamping.stamp_NKP
    optional = (none if x is None else x for x in (eviction.recent_B, eviction.kept_B, eviction.worth_NKP))
    evict_kernel[(whole.tail_BK.numel(),)](
        position_NKS, whole.tail_BK, full_NK.view(torch.int8), table.now_B, table.prompt_B, table.cap_B,
        eviction.pinned_B, *optional, stamp, score, rows, tables, slots,
        1 if stamping is None else score.shape[1] // tables, 0.0 if stamping is None else stamping.alpha,
        FRACTION=fraction, P=triton.next_power_of_2(slots), T=table.page_size, STAMP=stamping is not None,
        WORTH=2 if by_stamp else int(eviction.worth_NKP is not None), RECENT=eviction.recent_B is not None,
        KEPT=eviction.kept_B is not None, num_warps=4,
    )  # fmt: skip
    return full_NK


def move_tokens(store: SlotStore, moves: Moves, state_BKS: Tensor) -> None:
    """Move tokens to other slots, with position and their entry of `state_BKS`, in one launch."""
    rows, heads, tokens, dim = store.keys_BKSD.shape
    tables, count = moves.source_BKM.shape[1:]
    move_kernel[(rows * heads,)](
        store.keys_BKSD, store.values_BKSD, store.table.position_BKS, state_BKS,
        moves.source_BKM.contiguous(), moves.target_BKM.contiguous(), tokens, heads, tables, tables, count,
        D=dim, M=triton.next_power_of_2(count), BLOCK_D=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
