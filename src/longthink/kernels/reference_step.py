"""One decode step in few calls, in torch: the definition that the fused kernels are tested against.

The reads and writes of a step, cut where a GPU would cut them: append + attention + what a policy learns of one
layer, the bookkeeping of all layers, and the token copies of a page turn.

Shape suffixes: B batch rows, N rows of all layers (layer after layer), K KV heads (1 where one page table serves a
whole layer), G query heads per KV head, P page slots or pages of a table, T tokens in a page, S = P * T token slots,
D head dim, M tokens moved, X blocks of a pool.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longthink.kernels.reference import (
    Rule,
    bound_scores,
    decode_attention,
    evictable_pages,
    logical_pages,
    lowest,
    page_mass,
    stamp_used,
    top_pages,
)

LEARN = ("nothing", "bound", "bound_share", "mass", "weights", "marks", "heavy")


class Slots(NamedTuple):
    """Page slots of one layer, and where the new token goes: `tail_BK` is its page slot, `now_B` its position.

    `kmin_BKPD` and `kmax_BKPD` are the pages' representatives: given exactly where bounds are wanted, else None.
    """

    keys_BKSD: Tensor
    values_BKSD: Tensor
    position_BKS: Tensor
    tail_BK: Tensor
    now_B: Tensor
    page_size: int
    kmin_BKPD: Tensor | None = None
    kmax_BKPD: Tensor | None = None


class Pool(NamedTuple):
    """Physical blocks shared by all requests, and the blocks of each row: page p of row b is ``block_BKP[b, k, p]``.

    K is 1 where a table serves all KV heads. `length_B` counts a row's tokens, the new one included: it is the last
    one, and only the last page is partial.
    """

    keys_XTKD: Tensor
    values_XTKD: Tensor
    block_BKP: Tensor
    length_B: Tensor
    kmin_XKD: Tensor | None = None
    kmax_XKD: Tensor | None = None


class Learn(NamedTuple):
    """What a step shall tell the policy.

    Attributes
    ----------
    kind
        ``nothing``; ``bound``: Quest's bound of each page, the maximum over the group, -inf where the page is empty,
        BKP; ``bound_share``: its softmax over the pages, BKP; ``mass``: each page's share of the attention, the
        maximum over the group, BKP; ``weights``: the softmax weights, BKGS. The other two change `state_BKS` in
        place and return nothing:
        ``marks``: 1 where a token more than `near` tokens back got more than `alpha` of a query's attention (int8);
        ``heavy``: plus the attention summed over the group (float32). Both start a new page from 0.
    score_BKP
        Where the scores of ``bound``, ``bound_share`` and ``mass`` go (float32); None for a new tensor.
    """

    kind: str = "nothing"
    state_BKS: Tensor | None = None
    alpha: float = 0.0
    near: int = 0
    score_BKP: Tensor | None = None


class Turn(NamedTuple):
    """What the bookkeeping knows of the rows, and what decides which page gives way.

    Attributes
    ----------
    position_NKS, tail_NK
        Of all layers; the bookkeeping moves `tail_NK` on.
    now_B, prompt_B, cap_B
        Position of the token just read, prompt tokens, and page slots that may be filled.
    rule
        Which pages may give way to the next token.
    priority_NKP
        The smallest gives way, a tie to the lowest page; None for the page number itself (the oldest).
    """

    position_NKS: Tensor
    tail_NK: Tensor
    now_B: Tensor
    prompt_B: Tensor
    cap_B: Tensor
    page_size: int
    rule: Rule
    priority_NKP: Tensor | None = None


class Used(NamedTuple):
    """How pages get stamped: a share `r` of the best scores, or where `r` is None all scores above `alpha`."""

    stamp_NKP: Tensor
    score_NKP: Tensor
    r: float | None
    alpha: float = 0.0


def step_attention(
    query_BKGD: Tensor,
    key_BKD: Tensor,
    value_BKD: Tensor,
    cache: Slots | Pool,
    scaling: float,
    learn: Learn | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Write the new token into its slot, read what is resident, and learn; returns the output and the scores.

    The page of a token at its offset 0 is opened anew: whatever it held is gone. A row that holds nothing cannot be,
    since it holds the new token.

    Returns
    -------
    tuple of Tensor
        Output BKGD, and what `Learn.kind` says, float32, or None.
    """
    learn = Learn() if learn is None else learn
    append(cache, key_BKD, value_BKD)
    keys, values, resident = resident_slots(cache, query_BKGD.shape[1])
    with_weights = learn.kind in ("mass", "weights", "marks", "heavy")
    out, weights = decode_attention(query_BKGD, keys, values, resident, scaling, with_weights=with_weights)
    return out, _learn(query_BKGD, weights, resident, cache, scaling, learn)


def select_attention(
    query_BKGD: Tensor, key_BKD: Tensor, value_BKD: Tensor, slots: Slots, cap_B: Tensor, scaling: float
) -> Tensor:
    """Write the new token, and read the tail and the pages with the highest bounds, `cap_B` in all (Quest). BKGD.

    For caches that grow: slot p holds page p, so ties go to the lower slot.
    """
    append(slots, key_BKD, value_BKD)
    assert slots.kmin_BKPD is not None and slots.kmax_BKPD is not None
    page_BKP = logical_pages(slots.position_BKS, slots.page_size)
    score_BKP = bound_scores(query_BKGD, slots.kmin_BKPD, slots.kmax_BKPD).amax(2)
    pages = torch.arange(score_BKP.shape[-1], device=score_BKP.device)
    score_BKP = torch.where(pages == slots.tail_BK[..., None], torch.inf, score_BKP)
    order_BKP = top_pages(score_BKP, page_BKP, len(pages))
    chosen_BKP = order_BKP.argsort(-1) < cap_B[:, None, None]
    resident_BKS = chosen_BKP.repeat_interleave(slots.page_size, -1) & (slots.position_BKS >= 0)
    return decode_attention(
        query_BKGD, slots.keys_BKSD, slots.values_BKSD, resident_BKS, scaling, with_weights=True
    )[0]


def append(cache: Slots | Pool, key_BKD: Tensor, value_BKD: Tensor) -> None:
    """Write the new token; at offset 0 the page starts anew. Widens the page's representative.

    The cache may be of a narrower format than the token.
    """
    rows, heads = key_BKD.shape[:2]
    dtype = (cache.keys_XTKD if isinstance(cache, Pool) else cache.keys_BKSD).dtype
    key_BKD, value_BKD = key_BKD.to(dtype), value_BKD.to(dtype)
    row = torch.arange(rows, device=key_BKD.device)[:, None]
    head = torch.arange(heads, device=key_BKD.device)
    if isinstance(cache, Pool):
        last_B = cache.length_B.long() - 1
        page_size = cache.keys_XTKD.shape[1]
        block_BK = cache.block_BKP[row[:, 0], :, last_B // page_size].long()
        offset_B = last_B % page_size
        cache.keys_XTKD[block_BK, offset_B[:, None], head] = key_BKD
        cache.values_XTKD[block_BK, offset_B[:, None], head] = value_BKD
        at: tuple[Tensor, ...] = (block_BK, head)
        low, high = cache.kmin_XKD, cache.kmax_XKD
    else:
        page_size, offset_B = cache.page_size, cache.now_B % cache.page_size
        tail_BK = cache.tail_BK.expand(-1, heads)
        for tensor, new in ((cache.keys_BKSD, key_BKD), (cache.values_BKSD, value_BKD)):
            tensor[row, head, tail_BK * page_size + offset_B[:, None]] = new
        paged = cache.position_BKS.unflatten(-1, (-1, page_size))
        within = torch.arange(page_size, device=offset_B.device)
        before = paged[row, head[: paged.shape[1]], cache.tail_BK]
        offset_B11, now_B11 = offset_B[:, None, None], cache.now_B[:, None, None]
        after = torch.where(within == offset_B11, now_B11.to(before.dtype), before)
        paged[row, head[: paged.shape[1]], cache.tail_BK] = torch.where(within > offset_B11, -1, after)
        at = (row, head, tail_BK)
        low, high = cache.kmin_BKPD, cache.kmax_BKPD
    if low is not None and high is not None:
        first = (offset_B == 0)[:, None, None]
        low[at] = torch.where(first, key_BKD, torch.minimum(low[at], key_BKD))
        high[at] = torch.where(first, key_BKD, torch.maximum(high[at], key_BKD))


def resident_slots(cache: Slots | Pool, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values (BKSD) and whether a token is there (BKS), of each KV head."""
    if isinstance(cache, Slots):
        return cache.keys_BKSD, cache.values_BKSD, (cache.position_BKS >= 0).expand(-1, heads, -1)
    block_BKP, head_K1 = (
        cache.block_BKP.clamp(min=0).long(),
        torch.arange(heads, device=cache.block_BKP.device)[:, None],
    )
    keys, values = (
        pool.transpose(1, 2)[block_BKP, head_K1].flatten(2, 3)
        for pool in (cache.keys_XTKD, cache.values_XTKD)
    )
    token = torch.arange(keys.shape[2], device=keys.device)
    resident_BKS = (token < cache.length_B[:, None])[:, None].expand(-1, heads, -1)
    # A block that is not the row's may hold anything, and zero times NaN is NaN. Nobody looks at the logits there.
    return keys, values.masked_fill(~resident_BKS[..., None], 0), resident_BKS


def _learn(
    query_BKGD: Tensor,
    weights: Tensor | None,
    resident: Tensor,
    cache: Slots | Pool,
    scaling: float,
    learn: Learn,
) -> Tensor | None:
    page_size = cache.page_size if isinstance(cache, Slots) else cache.keys_XTKD.shape[1]
    if learn.kind in ("bound", "bound_share"):
        empty_BK1P = ~resident.unflatten(-1, (-1, page_size)).any(-1)[:, :, None]
        bound_BKGP = bound_scores(query_BKGD, *_representatives(cache)).masked_fill(empty_BK1P, -torch.inf)
        share = bound_BKGP if learn.kind == "bound" else (bound_BKGP * scaling).softmax(-1)
        return _scored(share.amax(2), learn)
    if weights is None or learn.kind == "weights":
        return weights
    if learn.kind == "mass":
        return _scored(page_mass(weights, page_size).amax(2), learn)
    if learn.kind in ("marks", "heavy"):
        assert isinstance(cache, Slots) and learn.state_BKS is not None
        state, offset_B = learn.state_BKS, (cache.now_B % page_size)[:, None, None]
        slot = torch.arange(state.shape[-1], device=state.device)
        opened = (slot // page_size == cache.tail_BK[..., None]) & (offset_B == 0)
        state.masked_fill_(opened, 0)
        if learn.kind == "heavy":
            state += weights.sum(2)
        else:
            far_BKS = resident & (cache.position_BKS < (cache.now_B - learn.near)[:, None, None])
            state |= (far_BKS & (weights.amax(2) > learn.alpha)).to(state.dtype)
    return None


def _scored(score_BKP: Tensor, learn: Learn) -> Tensor:
    return score_BKP if learn.score_BKP is None else learn.score_BKP.copy_(score_BKP)


def _representatives(cache: Slots | Pool) -> tuple[Tensor, Tensor]:
    if isinstance(cache, Slots):
        assert cache.kmin_BKPD is not None and cache.kmax_BKPD is not None
        return cache.kmin_BKPD, cache.kmax_BKPD
    assert cache.kmin_XKD is not None and cache.kmax_XKD is not None
    block_BKP = cache.block_BKP.clamp(min=0).long()
    head_K1 = torch.arange(cache.kmin_XKD.shape[1], device=block_BKP.device)[:, None]
    return cache.kmin_XKD[block_BKP, head_K1], cache.kmax_XKD[block_BKP, head_K1]


def bookkeep(turn: Turn, used: Used | None = None) -> Tensor:
    """After a step of all layers: stamp the pages that were used, and name the slot of the next token's page.

    Where the next token opens a page, `tail_NK` becomes the first empty slot or, where the cap is reached, the slot
    of the page that gives way. It keeps what it holds until a token is written there.

    Returns
    -------
    Tensor
        True where a page gives way, NK.
    """
    layers, page_size = len(turn.tail_NK) // len(turn.now_B), turn.page_size
    now_N, prompt_N, cap_N = (x.repeat(layers) for x in (turn.now_B, turn.prompt_B, turn.cap_B))
    pinned_N, recent_N, keeper_N = (None if x is None else x.repeat(layers) for x in turn.rule)
    assert pinned_N is not None
    rule = Rule(pinned_N, recent_N, keeper_N)
    page_NKP = logical_pages(turn.position_NKS, page_size)
    if used is not None:
        score = used.score_NKP
        # Where a table serves a layer, the best of all heads counts.
        score = score.amax(1, keepdim=True) if score.shape[1] > page_NKP.shape[1] else score
        stamp_used(used.stamp_NKP, score, page_NKP, now_N, page_size, used.r, used.alpha)
    priority = page_NKP if turn.priority_NKP is None else turn.priority_NKP
    evictable = evictable_pages(page_NKP, now_N + 1, prompt_N, page_size, rule)
    full_NK = (page_NKP >= 0).sum(-1) >= cap_N[:, None]
    empty_NK = (page_NKP < 0).to(torch.int8).argmax(-1)
    slot_NK = torch.where(full_NK, lowest(priority, page_NKP, evictable), empty_NK)
    opens_N1 = ((now_N + 1) % page_size == 0)[:, None]
    turn.tail_NK.copy_(torch.where(opens_N1, slot_NK, turn.tail_NK))
    return full_NK & opens_N1


def move_tokens(
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    position_BKS: Tensor,
    state_BKS: Tensor | None,
    source_BKM: Tensor,
    target_BKM: Tensor,
) -> None:
    """Carry tokens to other slots, with position and state; a source that does not become a target is then empty.

    A pair with source == target moves nothing. No source may be the target of another pair.
    """
    for tensor in (keys_BKSD, values_BKSD, *([] if state_BKS is None else [state_BKS])):
        tensor[entries(target_BKM, tensor)] = tensor[entries(source_BKM, tensor)]
    moved = position_BKS[entries(source_BKM, position_BKS)]
    position_BKS[entries(source_BKM, position_BKS)] = -1
    position_BKS[entries(target_BKM, position_BKS)] = moved


def entries(index_BKM: Tensor, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, heads and entries of dimension 2 that the index names, for all KV heads of the tensor.

    Whole index tensors instead of scatter and gather: a compiler writes those in place, without copying the slots.
    """
    rows, heads = (torch.arange(size, device=index_BKM.device) for size in tensor.shape[:2])
    return rows[:, None, None], heads[:, None], index_BKM
