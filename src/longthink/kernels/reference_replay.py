"""Tokens decoded again, in torch: the definition that the kernel in `triton_replay` is tested against.

Shape suffixes: N tokens, B rows, H query heads, K KV heads (in tables: 1 where one serves the whole layer), G query
heads per KV head, P page slots, T tokens in a page, D head dim, X blocks of a pool.
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
    stamp_used,
)


class Again(NamedTuple):
    """Rows of a pool whose tokens are decoded again, one after the other, and what decides which page gives way.

    Attributes
    ----------
    keys_XTKD, values_XTKD, position_XKT
        The pool of one layer.
    block_BP
        Block of each page slot that is in use behind the last token.
    start_B, count_B
        Where the row's tokens begin among all, and how many they are.
    first_B
        Position of the row's first token.
    pinned_B, cap_B
        Tokens whose pages stay, and page slots that may be filled.
    kmin_XKD, kmax_XKD, stamp_XK1, r
        Representatives, stamps, and the share of pages that a token uses, by Quest's bound: those pages are stamped,
        and the oldest stamp gives way. None where the oldest page gives way.
    """

    keys_XTKD: Tensor
    values_XTKD: Tensor
    position_XKT: Tensor
    block_BP: Tensor
    start_B: Tensor
    count_B: Tensor
    first_B: Tensor
    pinned_B: Tensor
    cap_B: Tensor
    kmin_XKD: Tensor | None = None
    kmax_XKD: Tensor | None = None
    stamp_XK1: Tensor | None = None
    r: float = 0.0


def replay(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, out_NHD: Tensor, again: Again, scaling: float
) -> None:
    """Give each token its place, let it read what is resident, and learn, before the next one; writes `out_NHD`."""
    tables, heads = again.position_XKT.shape[1], key_NKD.shape[1]
    query_NKGD, out_NKGD = (x.unflatten(1, (heads, -1)) for x in (query_NHD, out_NHD))
    for row, count in enumerate(again.count_B.tolist()):
        for i in range(count):
            token = int(again.start_B[row]) + i
            for table in range(tables):
                served = slice(table * heads // tables, (table + 1) * heads // tables)
                new = query_NKGD[token, served], key_NKD[token, served], value_NKD[token, served]
                out_NKGD[token, served] = _one(again, row, table, served, i, new, scaling)


def _one(
    again: Again,
    row: int,
    table: int,
    heads: slice,
    i: int,
    new: tuple[Tensor, Tensor, Tensor],
    scaling: float,
) -> Tensor:
    """Attention output of a token's heads that one table serves."""
    query_KGD, key_KD, value_KD = new
    now_B, prompt_B = again.first_B[row, None] + i, again.pinned_B[row, None]
    now, page_size, cap = int(now_B), again.keys_XTKD.shape[1], int(again.cap_B[row])
    blocks = again.block_BP[row, : min(now // page_size + 1, cap)].long()
    held = again.position_XKT[blocks, table].flatten()[None, None]
    page = logical_pages(held, page_size)
    stamp = None if again.stamp_XK1 is None else again.stamp_XK1[blocks, table, 0][None, None].clone()
    slot = int((page == now // page_size).to(torch.int8).argmax())
    if now % page_size == 0:
        evictable = evictable_pages(page, now_B, prompt_B, page_size, Rule(prompt_B))
        victim = lowest(page if stamp is None else stamp, page, evictable)
        slot = now // page_size if now // page_size < cap else int(victim)
        again.position_XKT[blocks[slot], table] = -1
    again.position_XKT[blocks[slot], table, now % page_size] = now
    at = blocks[slot], now % page_size, heads
    again.keys_XTKD[at] = key_KD.to(again.keys_XTKD.dtype)
    again.values_XTKD[at] = value_KD.to(again.values_XTKD.dtype)
    held = again.position_XKT[blocks, table].flatten()[None, None]
    keys, values = (
        x[blocks][:, :, heads].flatten(0, 1).transpose(0, 1)[None]
        for x in (again.keys_XTKD, again.values_XTKD)
    )
    keys, values = (x.masked_fill((held < 0)[..., None], 0) for x in (keys, values))
    if stamp is not None:
        assert again.kmin_XKD is not None and again.kmax_XKD is not None and again.stamp_XK1 is not None
        for ends, extreme in ((again.kmin_XKD, torch.minimum), (again.kmax_XKD, torch.maximum)):
            old = ends[blocks[slot], heads]
            ends[blocks[slot], heads] = key_KD if now % page_size == 0 else extreme(old, key_KD.to(old.dtype))
        low, high = (x[blocks][:, heads].transpose(0, 1)[None] for x in (again.kmin_XKD, again.kmax_XKD))
        score = bound_scores(query_KGD[None], low, high).amax(2).amax(1, keepdim=True)
        stamp_used(stamp, score, logical_pages(held, page_size), now_B, page_size, again.r, 0.0)
        again.stamp_XK1[blocks, table, 0] = stamp[0, 0]
    return decode_attention(query_KGD[None], keys, values, held >= 0, scaling, with_weights=False)[0][0]
