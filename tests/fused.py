"""Stand-ins in torch for the fused kernels, so that a CPU can take the route of a GPU around them.

They are not what the kernels are tested against (that is the general route, in `tests/kernels`): they let the rest of
the fused route, its groups of layers, its programs and its recorded steps, be tested where nothing interprets Triton.

Shape suffixes: N rows of all layers (layer after layer), B batch rows, K KV heads, P page slots, T tokens in a page.
"""

from types import SimpleNamespace

import pytest
import torch

from longthink import accelerators, kernels
from longthink.cache.step import choose_slots
from longthink.kernels import reference


def force(monkeypatch: pytest.MonkeyPatch, *, stand_ins: bool = True) -> None:
    """Let policies take their fused steps on a CPU."""
    pytest.importorskip("triton")
    from longthink.accelerators import attention, triton_tables

    monkeypatch.setattr(accelerators, "available", lambda tensor: True)
    if stand_ins:
        for function in (step_attention, select_attention):
            monkeypatch.setattr(attention, function.__name__, function)
        for function in (evict, move_tokens):
            monkeypatch.setattr(triton_tables, function.__name__, function)


def append(slots, key, value):
    """Write the new token; its page holds nothing behind it, and starts anew at offset 0."""
    rows, heads, size = *key.shape[:2], slots.page_size
    row, head = torch.arange(rows)[:, None], torch.arange(heads)
    offset = (slots.now_B % size)[:, None]
    tail = slots.tail_BK.expand(-1, heads)
    slots.keys_BKSD[row, head, tail * size + offset] = key.to(slots.keys_BKSD.dtype)
    slots.values_BKSD[row, head, tail * size + offset] = value.to(slots.values_BKSD.dtype)
    at = torch.arange(rows)[:, None, None], torch.arange(slots.tail_BK.shape[1])[:, None]
    within = torch.arange(size)
    token = slots.tail_BK[..., None] * size + within
    before, now = slots.position_BKS[(*at, token)], slots.now_B[:, None, None].to(torch.int32)
    after = torch.where(within == offset[..., None], now, before)
    slots.position_BKS[(*at, token)] = torch.where(within > offset[..., None], -1, after)
    for bound, extreme in ((slots.kmin_BKPD, torch.minimum), (slots.kmax_BKPD, torch.maximum)):
        if bound is not None:
            old = bound[row, head, tail]
            bound[row, head, tail] = torch.where(offset[..., None] == 0, key, extreme(old, key))


def step_attention(query, key, value, slots, scaling, side, score_BKP=None):
    append(slots, key, value)
    resident = (slots.position_BKS >= 0).expand(-1, key.shape[1], -1)
    out, weights = reference.decode_attention(
        query, slots.keys_BKSD, slots.values_BKSD, resident, scaling, with_weights=True
    )
    found = None
    if side.bound:
        empty = ~resident.unflatten(-1, (-1, slots.page_size)).any(-1)[:, :, None]
        bound = reference.bound_scores(query, slots.kmin_BKPD, slots.kmax_BKPD).masked_fill(empty, -torch.inf)
        found = (bound if side.bound == 1 else (bound * scaling).softmax(-1)).amax(2)
    elif side.score == 1:
        found = kernels.page_mass(weights, slots.page_size).amax(2)
    if side.state_BKS is not None:
        slot = torch.arange(side.state_BKS.shape[-1])
        tail, offset = slots.tail_BK[..., None], (slots.now_B % slots.page_size)[:, None, None]
        side.state_BKS.masked_fill_((slot // slots.page_size == tail) & (offset == 0), 0)
        if side.combine == 5:
            side.state_BKS.add_(weights.sum(2))
        else:
            far = resident & (slots.position_BKS < (slots.now_B - side.near)[:, None, None])
            side.state_BKS.bitwise_or_((far & (weights.amax(2) > side.alpha)).to(torch.int8))
    if found is not None and score_BKP is not None:
        found = score_BKP.copy_(found)
    return out, found


def select_attention(query, key, value, slots, cap_B, scaling):
    append(slots, key, value)
    page = kernels.logical_pages(slots.position_BKS, slots.page_size)
    score = reference.bound_scores(query, slots.kmin_BKPD, slots.kmax_BKPD).amax(2)
    score = torch.where(torch.arange(score.shape[-1]) == slots.tail_BK[..., None], torch.inf, score)
    chosen = kernels.top_pages(score, page, score.shape[-1]).argsort(-1) < cap_B[:, None, None]
    resident = chosen.repeat_interleave(slots.page_size, -1) & (slots.position_BKS >= 0)
    return reference.decode_attention(
        query, slots.keys_BKSD, slots.values_BKSD, resident, scaling, with_weights=True
    )[0]


def evict(whole, first, eviction, stamping=None):
    """Stamps by `RaaS.stamp`, eviction by `choose_slots`, told what the kernel is told."""
    from longthink.policies import RaaS

    layers, table = len(whole.tail_BK) // len(first.table.now_B), first.table
    now, prompt, cap = (x.repeat(layers) for x in (table.now_B, table.prompt_B, table.cap_B))
    seen = SimpleNamespace(page_BKP=whole.table.page_BKP, state=whole.table.state, cap_B=cap, now_B=now)
    if stamping is not None:
        used = "alpha" if stamping.r is None else "top_r"
        policy = RaaS(page_size=table.page_size, r=stamping.r or 0.0, used=used, alpha=stamping.alpha)
        score, seen.now_B = stamping.score_NKP, now - 1
        shared = score.shape[1] > seen.page_BKP.shape[1]
        policy.stamp(seen, score.amax(1, keepdim=True) if shared else score)
        seen.now_B = now
    pinned, recent, kept = (None if x is None else x.repeat(layers)[:, None, None] for x in eviction[:3])
    page, size = seen.page_BKP, table.page_size
    protected = page * size < pinned
    if recent is not None:
        protected = protected | (page > now[:, None, None] // size - recent)
    if kept is not None:
        behind = torch.arange(page.shape[-1]) - ((prompt + size - 1) // size)[:, None, None]
        protected = protected | ((behind >= 0) & (behind < kept))
    worth = page if eviction.worth_NKP is None else eviction.worth_NKP
    told = SimpleNamespace(protected=lambda table: protected, worth=lambda table: worth)
    opens = now % size == 0
    slot, _ = choose_slots(told, seen, opens, evicts=True)
    whole.tail_BK.copy_(torch.where(opens[:, None], slot, whole.tail_BK))
    return ((page >= 0).sum(-1) >= cap[:, None]) & opens[:, None]


def move_tokens(store, moves, state_BKS):
    store.move(moves)
