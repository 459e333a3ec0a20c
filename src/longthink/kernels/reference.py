"""Attention and page scores in plain torch: the reference for every faster kernel.

Shape suffixes: B batch rows, H query heads, K KV heads (1 where one page table serves a whole layer),
G query heads per KV head, Q query tokens, N key columns, P page slots or pages of a block table, T tokens in a page,
S = P * T token slots, D head dim, R pages read, X blocks of a pool.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_QUERIES_AT_ONCE = 256
_COMPARED_AT_ONCE = 128  # page slots up to which pairwise comparison is faster than sorting


class PagedKV(NamedTuple):
    """Blocks of a pool that all requests share, and block tables: page p of row b is ``block_BKP[b, k, p]``.

    K of the block table is 1 where it serves all KV heads. `length_B` counts a row's tokens; only its last page may
    be partial.
    """

    keys_XTKD: Tensor
    values_XTKD: Tensor
    block_BKP: Tensor
    length_B: Tensor


class LogitRule(NamedTuple):
    """What a layer does with its scaled logits before their softmax: nothing by default.

    Parameters
    ----------
    softcap
        The logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).
    sink_H
        For each query head the logit of a sink: it takes part in the softmax, and has no value (gpt-oss).
    """

    softcap: float | None = None
    sink_H: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sink_H is None


PLAIN = LogitRule()


def block_attention(
    query_BHQD: Tensor, key_BKND: Tensor, value_BKND: Tensor, mask_BKQN: Tensor | None, scaling: float,
    rule: LogitRule = PLAIN,
) -> Tensor:  # fmt: skip
    """Attention of a block of queries (prefill), BHQD; zeros for a query that may read nothing (padding).

    The mask is True where a query may read a key, broadcastable over B and K; None for a causal block (Q == N).
    Values may have another head dim than keys: it is that of the output.
    """
    groups = query_BHQD.shape[1] // key_BKND.shape[1]
    if not rule.is_plain:
        return _block_attention_by_weights(query_BHQD, key_BKND, value_BKND, mask_BKQN, scaling, rule)
    if mask_BKQN is None:
        return scaled_dot_product_attention(
            query_BHQD, key_BKND, value_BKND, is_causal=True, scale=scaling, enable_gqa=groups > 1
        )
    mask_BHQN = mask_BKQN.repeat_interleave(groups, 1) if mask_BKQN.shape[1] > 1 else mask_BKQN
    return scaled_dot_product_attention(
        query_BHQD, key_BKND, value_BKND, attn_mask=mask_BHQN, scale=scaling, enable_gqa=groups > 1
    )


def _block_attention_by_weights(
    query_BHQD: Tensor, key_BKND: Tensor, value_BKND: Tensor, mask_BKQN: Tensor | None, scaling: float,
    rule: LogitRule,
) -> Tensor:  # fmt: skip
    """`block_attention` where SDPA does not know the rule: in slices, so memory is linear in the keys."""
    columns = query_BHQD.shape[2]
    if mask_BKQN is None:
        mask_BKQN = torch.ones(columns, columns, dtype=torch.bool, device=query_BHQD.device).tril()[
            None, None
        ]
    query_BKGQD = query_BHQD.unflatten(1, (key_BKND.shape[1], -1))
    out = []
    for start in range(0, columns, _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        query, mask = query_BKGQD[:, :, :, part], mask_BKQN[:, :, None, part]
        attended, _ = weighted_attention(
            query, key_BKND[:, :, None], value_BKND[:, :, None], mask, scaling, rule
        )
        out.append(attended)
    return torch.cat(out, 3).flatten(1, 2)


def column_mass(
    query_BHQD: Tensor, key_BKND: Tensor, mask_BKQN: Tensor, readers_BQ: Tensor, scaling: float,
    rule: LogitRule = PLAIN,
) -> Tensor:  # fmt: skip
    """Softmax attention that each key column receives, summed over queries and the heads of its group. BKN, float32.

    Queries are processed in slices, so memory is linear in the prompt; `readers_BQ` is False for padding.
    """
    kv_heads = key_BKND.shape[1]
    query_BKGQD = query_BHQD.unflatten(1, (kv_heads, -1))
    wide = wide_dtype(query_BHQD.dtype)
    mass_BKN = torch.zeros(key_BKND.shape[:3], dtype=wide, device=key_BKND.device)
    for start in range(0, query_BHQD.shape[2], _QUERIES_AT_ONCE):
        part = slice(start, start + _QUERIES_AT_ONCE)
        logits = (
            torch.einsum("bkgqd,bknd->bkgqn", query_BKGQD[:, :, :, part].to(wide), key_BKND.to(wide))
            * scaling
        )
        weights = logit_weights(logits, mask_BKQN[:, :, None, part], rule)
        mass_BKN += torch.einsum("bkgqn,bq->bkn", weights, readers_BQ[:, part].to(wide))
    return mass_BKN


def decode_attention(
    query_BKGD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor, resident_BKS: Tensor, scaling: float, *,
    with_weights: bool, rule: LogitRule = PLAIN,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of one new token per row over the slots of the cache, without repeating KV heads.

    Keys and values may be narrower than the query; `resident_BKS` is True where a slot holds a token. Returns the
    output BKGD, and the softmax weights BKGS (float32 or wider) or None.
    """
    mask_BKGS = resident_BKS[:, :, None]
    # On a CPU it is faster to widen narrow keys as they are read, which the compiler fuses, than to narrow the query.
    widens = keys_BKSD.dtype != query_BKGD.dtype and keys_BKSD.device.type == "cpu"
    if not with_weights and not widens and rule.is_plain:
        # The heads of a group take the place of SDPA's query tokens: they share the keys of their KV head.
        mask = mask_BKGS.expand(-1, query_BKGD.shape[1], query_BKGD.shape[2], -1)
        out_BKGD = scaled_dot_product_attention(
            query_BKGD.to(keys_BKSD.dtype), keys_BKSD, values_BKSD, attn_mask=mask, scale=scaling
        )
        return out_BKGD.to(query_BKGD.dtype), None
    out_BKGD, weights_BKGS = weighted_attention(query_BKGD, keys_BKSD, values_BKSD, mask_BKGS, scaling, rule)
    return out_BKGD, weights_BKGS if with_weights else None


def weighted_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, rule: LogitRule = PLAIN
) -> tuple[Tensor, Tensor]:
    """Attention of the queries in the second to last dimension, and its softmax weights (float32 or wider).

    The dimensions before, and those of the mask, broadcast; keys and values may be narrower than the query. With a
    rule the first dimensions are B, K and G.
    """
    dtype = query.dtype
    logits = (query @ keys.to(dtype).transpose(-1, -2)).to(wide_dtype(dtype)) * scaling
    weights = logit_weights(logits, mask, rule)
    return weights.to(dtype) @ values.to(dtype), weights


def paged_attention(query_BKGD: Tensor, paged: PagedKV, scaling: float) -> Tensor:
    """Attention of one new token per row, which has been written, over the blocks of its table. Returns BKGD."""
    keys, values, resident = gather_blocks(paged, query_BKGD.shape[1])
    return decode_attention(query_BKGD, keys, values, resident, scaling, with_weights=False)[0]


def gather_blocks(paged: PagedKV, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of each row (BKSD), and the residency mask (BKS)."""
    block_BKP = paged.block_BKP.clamp(min=0).long()
    head_K1 = torch.arange(heads, device=block_BKP.device)[:, None]
    keys, values = (
        pool.transpose(1, 2)[block_BKP, head_K1].flatten(2, 3)
        for pool in (paged.keys_XTKD, paged.values_XTKD)
    )
    token = torch.arange(keys.shape[2], device=keys.device)
    resident_BKS = (token < paged.length_B[:, None])[:, None].expand(-1, heads, -1)
    # Unused entries may hold NaN, which survives both a zero weight and an additive mask.
    keys, values = (x.masked_fill(~resident_BKS[..., None], 0) for x in (keys, values))
    return keys, values, resident_BKS


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension, restricted to the mask; zeros elsewhere."""
    floor = torch.finfo(logits.dtype).min
    return torch.where(mask, logits, floor).softmax(-1) * mask


def logit_weights(logits: Tensor, mask: Tensor, rule: LogitRule) -> Tensor:
    """`masked_softmax` of scaled logits by a rule; with a sink they have dimensions B, K and G first."""
    if rule.softcap is not None:
        logits = rule.softcap * (logits / rule.softcap).tanh()
    if rule.sink_H is None:
        return masked_softmax(logits, mask)
    sink = rule.sink_H.to(logits.dtype).view(*logits.shape[1:3], *[1] * (logits.ndim - 3))
    masked = torch.where(mask, logits, torch.finfo(logits.dtype).min)
    with_sink = torch.cat([masked, sink.expand(*logits.shape[:-1], 1)], -1)
    return with_sink.softmax(-1)[..., :-1] * mask


def bound_scores(query_BKGD: Tensor, kmin_BKPD: Tensor, kmax_BKPD: Tensor) -> Tensor:
    """Quest's upper bound on q.k in each page (arXiv 2406.10774, algorithm 1), shape BKGP.

    ``sum_d max(q_d * kmin_d, q_d * kmax_d)`` as two products: the positive part of the query times the maxima, and
    the negative part times the minima.
    """
    wide = wide_dtype(query_BKGD.dtype)
    query = query_BKGD.to(wide)
    highest = query.clamp(min=0) @ kmax_BKPD.to(wide).transpose(-1, -2)
    return highest + query.clamp(max=0) @ kmin_BKPD.to(wide).transpose(-1, -2)


def page_mass(weights_BKGS: Tensor, page_size: int) -> Tensor:
    """Share of the attention on each page slot, shape BKGP."""
    return weights_BKGS.unflatten(-1, (-1, page_size)).sum(-1)


def top_fraction(score_BKP: Tensor, page_BKP: Tensor, fraction: float) -> Tensor:
    """Mark the ``ceil(fraction * resident)`` best of the resident pages (bool, BKP); ties go to the lower page.

    `page_BKP` is the logical page of each slot, negative where it is empty.
    """
    resident_BKP = page_BKP >= 0
    # The offset cancels binary rounding: 0.3 * 170 pages must count 51, not 52.
    count_BK1 = (resident_BKP.sum(-1, keepdim=True).double() * fraction - 1e-9).ceil()
    return _rank(score_BKP, page_BKP) < count_BK1


def top_pages(score_BKP: Tensor, page_BKP: Tensor, count: int) -> Tensor:
    """Slots of the `count` best resident pages, best first; ties go to the lower page. Shape BKR."""
    return _order(score_BKP, page_BKP)[..., :count]


def _rank(score_BKP: Tensor, page_BKP: Tensor) -> Tensor:
    if score_BKP.shape[-1] > _COMPARED_AT_ONCE:
        return _order(score_BKP, page_BKP).argsort(-1)
    # The compiler fuses comparisons into one loop, but neither a sort nor `isnan`. NaN ranks above infinity.
    broken_BKP, empty_BKP = score_BKP != score_BKP, page_BKP < 0
    score = score_BKP.masked_fill(broken_BKP, torch.inf).masked_fill(empty_BKP, -torch.inf)
    far = torch.iinfo(page_BKP.dtype).max
    page = torch.where(broken_BKP, page_BKP - far // 2, page_BKP).masked_fill(empty_BKP, far)
    mine_BKP1, other_BK1P = (score[..., None], page[..., None]), (score[..., None, :], page[..., None, :])
    tied_BKPP = (other_BK1P[0] == mine_BKP1[0]) & (other_BK1P[1] < mine_BKP1[1])
    # Integer sums are not vectorised; these are exact in float32.
    return ((other_BK1P[0] > mine_BKP1[0]) | tied_BKPP).sum(-1, dtype=torch.float32)


def _order(score_BKP: Tensor, page_BKP: Tensor) -> Tensor:
    """Slots by descending score, then by ascending page; empty slots last."""
    score = torch.where(page_BKP >= 0, score_BKP, -torch.inf)
    far = torch.iinfo(page_BKP.dtype).max
    by_page = torch.where(page_BKP >= 0, page_BKP, far).argsort(dim=-1, stable=True)
    return by_page.gather(-1, score.gather(-1, by_page).argsort(dim=-1, descending=True, stable=True))


def lowest(priority_BKP: Tensor, page_BKP: Tensor, candidates_BKP: Tensor) -> Tensor:
    """Slot of the candidate with the smallest priority; ties go to the lowest logical page. Shape BK.

    NaN counts as the smallest. Without any candidate the result is meaningless.
    """
    priority = priority_BKP
    if priority.is_floating_point():
        priority = priority.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        worst = torch.inf
    else:
        worst = torch.iinfo(priority.dtype).max
    smallest = torch.where(candidates_BKP, priority, worst).amin(-1, keepdim=True)
    tied_BKP = candidates_BKP & (priority == smallest)
    return torch.where(tied_BKP, page_BKP, torch.iinfo(page_BKP.dtype).max).argmin(-1)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores and softmax weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32
