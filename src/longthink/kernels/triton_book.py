"""What is done once for all layers, in Triton: stamps, the page that gives way, the token copies of a page turn.

Shape suffixes: see `reference_step`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longthink.kernels.reference_step import Turn, Used
from longthink.kernels.triton_parts import is_best, least_of_best, rank_key

_FAR = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _pages(position, slots, P: tl.constexpr, T: tl.constexpr):
    """Logical page in each slot, -1 where it is empty."""
    token = tl.arange(0, P)[:, None] * T + tl.arange(0, T)[None, :]
    held = tl.max(tl.load(position + token, mask=(tl.arange(0, P) < slots)[:, None], other=-1), 1)
    return tl.where(held < 0, -1, held // T)


@triton.jit
def _stamp(
    stamp, score, page, now, slots, shared, alpha, FRACTION: tl.constexpr, P: tl.constexpr, T: tl.constexpr
):
    """Give the pages that were used the stamp `now`: see `RaaS.observe`. FRACTION is negative where alpha decides."""
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
def bookkeep_kernel(
    position, tail, full, now, prompt, cap, pinned, recent, keeper, priority, stamp, score,
    rows, tables, slots, shared, alpha,
    FRACTION: tl.constexpr, P: tl.constexpr, T: tl.constexpr, STAMP: tl.constexpr, PRIORITY: tl.constexpr,
    RECENT: tl.constexpr, KEEPER: tl.constexpr,
):  # fmt: skip
    """One page table of one row and layer. PRIORITY: 0 the page, 1 a tensor, 2 the stamps that were just set."""
    own = tl.program_id(0).to(tl.int64)
    row = own // tables % rows
    slot = tl.arange(0, P)
    page = _pages(position + own * slots * T, slots, P, T)
    new = tl.load(now + row).to(tl.int32) + 1
    worth = page
    if STAMP:
        at = own * slots
        stamps = _stamp(stamp + at, score + at * shared, page, new - 1, slots, shared, alpha, FRACTION, P, T)
        if PRIORITY == 2:
            worth = stamps
    if PRIORITY == 1:
        worth = tl.load(priority + own * slots + slot, mask=slot < slots, other=0)
    may = (page >= 0) & (page * T >= tl.load(pinned + row))
    if RECENT:
        may = may & (page <= new // T - tl.load(recent + row))
    if KEEPER:
        behind = slot - (tl.load(prompt + row) + T - 1) // T
        may = may & ((behind < 0) | (behind >= tl.load(keeper + row)))
    if worth.dtype.is_floating():
        worth = tl.where(worth != worth, float("-inf"), worth)
        least = tl.min(tl.where(may, worth, float("inf")), 0)
    else:
        least = tl.min(tl.where(may, worth, _FAR), 0)
    oldest = tl.where(may & (worth == least), page, _FAR)
    victim = tl.argmin(oldest, 0)
    held = tl.sum((page >= 0).to(tl.int32), 0)
    empty = tl.argmax(((page < 0) & (slot < slots)).to(tl.int32), 0)
    is_full = held >= tl.load(cap + row)
    opens = new % T == 0
    tl.store(tail + own, tl.where(is_full, victim, empty).to(tl.int64), mask=opens)
    tl.store(full + own, (is_full & opens).to(tl.int8))


@triton.jit
def move_kernel(
    keys, values, position, state, source, target, tokens, heads, tables, states, moves,
    D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """One row and KV head: everything is read before anything is written."""
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
    # A table that the heads of a layer share is changed by the first of them.
    moved = moved & (table * heads == row * tables * heads + head * tables)
    at = position + table * tokens
    place = tl.load(at + old, mask=moved, other=-1)
    tl.store(at + old, place * 0 - 1, mask=moved)
    tl.store(at + new, place, mask=moved)
    if STATE:
        at = state + table * tokens
        tl.store(at + new, tl.load(at + old, mask=moved, other=0), mask=moved)


def bookkeep(turn: Turn, used: Used | None = None) -> Tensor:
    """One launch for all layers: see `reference_step.bookkeep`. All tensors of tables must be contiguous."""
    rows, (_, tables, tokens) = len(turn.now_B), turn.position_NKS.shape
    slots = tokens // turn.page_size
    none = turn.position_NKS
    full_NK = torch.empty_like(turn.tail_NK, dtype=torch.bool)
    stamp, score = (none, none) if used is None else (used.stamp_NKP, used.score_NKP)
    fraction = -1.0 if used is None or used.r is None else used.r
    by_stamp = used is not None and turn.priority_NKP is used.stamp_NKP
    rule = turn.rule
    optional = (none if x is None else x for x in (rule.recent_B, rule.keeper_B, turn.priority_NKP))
    bookkeep_kernel[(turn.tail_NK.numel(),)](
        turn.position_NKS, turn.tail_NK, full_NK.view(torch.int8), turn.now_B, turn.prompt_B,
        turn.cap_B, rule.pinned_B, *optional, stamp, score, rows, tables, slots,
        1 if used is None else score.shape[1] // tables, 0.0 if used is None else used.alpha,
        FRACTION=fraction, P=triton.next_power_of_2(slots), T=turn.page_size, STAMP=used is not None,
        PRIORITY=2 if by_stamp else int(turn.priority_NKP is not None), RECENT=rule.recent_B is not None,
        KEEPER=rule.keeper_B is not None, num_warps=4,
    )  # fmt: skip
    return full_NK


def move_tokens(
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    position_BKS: Tensor,
    state_BKS: Tensor | None,
    source_BKM: Tensor,
    target_BKM: Tensor,
) -> None:
    """One launch: see `reference_step.move_tokens`. All tensors must be contiguous; rows may be of several layers."""
    rows, heads, tokens, dim = keys_BKSD.shape
    tables, moves = source_BKM.shape[1:]
    move_kernel[(rows * heads,)](
        keys_BKSD, values_BKSD, position_BKS, position_BKS if state_BKS is None else state_BKS,
        source_BKM.contiguous(), target_BKM.contiguous(), tokens, heads, tables, tables, moves,
        D=dim, M=triton.next_power_of_2(moves), BLOCK_D=triton.next_power_of_2(dim), STATE=state_BKS is not None,
        num_warps=4,
    )  # fmt: skip
