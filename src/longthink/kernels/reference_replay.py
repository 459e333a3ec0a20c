"""Tokens decoded again, in torch: the definition that the kernel in `triton_replay` is tested against.

Shape suffixes: N tokens, B rows, H query heads, K KV heads (in tables: 1 where one serves the whole layer), G query
heads per KV head, P page slots, T tokens in a page, D head dim, X blocks of a pool.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longthink.kernels.reference import Rule, evictable_pages, logical_pages, lowest, stamp_used
from longthink.kernels.reference_step import Learn, Pool, step_attention


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
    now_B, pinned_B = again.first_B[row, None] + i, again.pinned_B[row, None]
    now, page_size, cap = int(now_B), again.keys_XTKD.shape[1], int(again.cap_B[row])
    blocks = again.block_BP[row, : min(now // page_size + 1, cap)].long()
    page = logical_pages(again.position_XKT[blocks, table].flatten()[None, None], page_size)
    slot = int((page == now // page_size).to(torch.int8).argmax())
    if now % page_size == 0:
        worth = page if again.stamp_XK1 is None else again.stamp_XK1[blocks, table, 0][None, None]
        evictable = evictable_pages(page, now_B, pinned_B, page_size, Rule(pinned_B))
        slot = now // page_size if now // page_size < cap else int(lowest(worth, page, evictable))
        again.position_XKT[blocks[slot], table] = -1
    again.position_XKT[blocks[slot], table, now % page_size] = now
    # Order means nothing to attention and stamps, and a `Pool` wants the page that is written to last.
    blocks = torch.cat([blocks[:slot], blocks[slot + 1 :], blocks[slot, None]])
    ends = (None if x is None else x[:, heads] for x in (again.kmin_XKD, again.kmax_XKD))
    length_B = (len(blocks) - 1) * page_size + now_B % page_size + 1
    pool = Pool(
        again.keys_XTKD[:, :, heads], again.values_XTKD[:, :, heads], blocks[None, None], length_B, *ends
    )
    learn = Learn("nothing" if again.stamp_XK1 is None else "bound")
    query_KGD, key_KD, value_KD = new
    out_1KGD, score_1KP = step_attention(query_KGD[None], key_KD[None], value_KD[None], pool, scaling, learn)
    if again.stamp_XK1 is not None:
        assert score_1KP is not None
        stamp = again.stamp_XK1[blocks, table, 0][None, None]
        page = logical_pages(again.position_XKT[blocks, table].flatten()[None, None], page_size)
        stamp_used(stamp, score_1KP.amax(1, keepdim=True), page, now_B, page_size, again.r, 0.0)
        again.stamp_XK1[blocks, table, 0] = stamp[0, 0]
    return out_1KGD[0]
