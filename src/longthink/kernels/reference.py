"""Reference kernels in torch: the definition that every faster kernel is tested against.

Shape suffixes: B batch rows, H query heads, K KV heads (1 where one page table serves a whole layer),
G query heads per KV head, Q query tokens, N key columns, P page slots, T tokens in a page, S = P * T token
slots, D head dim, R pages read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_MASK64 = (1 << 64) - 1
_QUERIES_AT_ONCE = 256
_COMPARED_AT_ONCE = 128
"""Page slots up to which comparing each with each is faster than sorting."""


class Rule(NamedTuple):
    """Which resident pages may give way: all that nothing here holds back.

    Attributes
    ----------
    pinned_B
        So many tokens at the start stay, in whole pages.
    recent_B
        Pages newer than this many pages before the present token stay; None where that holds none back.
    keeper_B
        So many slots behind the prompt's stay; None for none.
    """

    pinned_B: Tensor
    recent_B: Tensor | None = None
    keeper_B: Tensor | None = None


def block_attention(
    query_BHQD: Tensor, key_BKND: Tensor, value_BKND: Tensor, mask_BKQN: Tensor | None, scaling: float
) -> Tensor:
    """Attention of a block of queries (prefill).

    Parameters
    ----------
    mask_BKQN
        True where a query may read a key, broadcastable over B and K; None for a plain causal block (Q == N).

    Returns
    -------
    Tensor
        Output, shape BHQD. A query that may read nothing (padding) gets zeros.
    """
    groups = query_BHQD.shape[1] // key_BKND.shape[1]
    if mask_BKQN is None:
        return scaled_dot_product_attention(
            query_BHQD, key_BKND, value_BKND, is_causal=True, scale=scaling, enable_gqa=groups > 1
        )
    mask_BHQN = mask_BKQN.repeat_interleave(groups, 1) if mask_BKQN.shape[1] > 1 else mask_BKQN
    return scaled_dot_product_attention(
        query_BHQD, key_BKND, value_BKND, attn_mask=mask_BHQN, scale=scaling, enable_gqa=groups > 1
    )


def column_mass(
    query_BHQD: Tensor, key_BKND: Tensor, mask_BKQN: Tensor, readers_BQ: Tensor, scaling: float
) -> Tensor:
    """Softmax attention that each key column receives, summed over the queries and the heads of its group.

    Works on slices of the queries, so that memory stays linear in the prompt (H2O accumulates the prefill,
    arXiv 2306.14048).

    Parameters
    ----------
    readers_BQ
        True for the queries that count (padding does not).

    Returns
    -------
    Tensor
        Mass, shape BKN, float32 (float64 for float64 inputs).
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
        weights = masked_softmax(logits, mask_BKQN[:, :, None, part])
        mass_BKN += torch.einsum("bkgqn,bq->bkn", weights, readers_BQ[:, part].to(wide))
    return mass_BKN


def decode_attention(
    query_BKGD: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    resident_BKS: Tensor,
    scaling: float,
    *,
    with_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new token per row over the slots of the cache, without repeating KV heads.

    Parameters
    ----------
    keys_BKSD, values_BKSD
        May be of a narrower format than the query.
    resident_BKS
        True where a token slot holds a token.
    with_weights
        Also return the softmax weights, for policies that learn from exact attention.

    Returns
    -------
    tuple of Tensor
        Output BKGD, and weights BKGS (float32 or wider) or None.
    """
    mask_BKGS = resident_BKS[:, :, None]
    # On a CPU, one query over narrow keys is faster when each key is widened as it is read, which a compiler fuses.
    widens = keys_BKSD.dtype != query_BKGD.dtype and keys_BKSD.device.type == "cpu"
    if not with_weights and not widens:
        # The group's heads stand where SDPA expects query tokens: they share the keys of their KV head.
        mask = mask_BKGS.expand(-1, query_BKGD.shape[1], query_BKGD.shape[2], -1)
        out_BKGD = scaled_dot_product_attention(
            query_BKGD.to(keys_BKSD.dtype), keys_BKSD, values_BKSD, attn_mask=mask, scale=scaling
        )
        return out_BKGD.to(query_BKGD.dtype), None
    dtype = query_BKGD.dtype
    logits_BKGS = (query_BKGD @ keys_BKSD.to(dtype).transpose(-1, -2)).to(wide_dtype(dtype)) * scaling
    weights_BKGS = masked_softmax(logits_BKGS, mask_BKGS)
    out_BKGD = weights_BKGS.to(dtype) @ values_BKSD.to(dtype)
    return out_BKGD, weights_BKGS if with_weights else None


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where the mask is True; zeros where it is False."""
    floor = torch.finfo(logits.dtype).min
    return torch.where(mask, logits, floor).softmax(-1) * mask


def bound_scores(query_BKGD: Tensor, kmin_BKPD: Tensor, kmax_BKPD: Tensor) -> Tensor:
    """Quest's upper bound of the largest q.k in each page (arXiv 2406.10774, algorithm 1), shape BKGP.

    ``sum_d max(q_d * kmin_d, q_d * kmax_d)`` as two products: positive query parts meet the maxima,
    negative ones the minima.
    """
    wide = wide_dtype(query_BKGD.dtype)
    query = query_BKGD.to(wide)
    highest = query.clamp(min=0) @ kmax_BKPD.to(wide).transpose(-1, -2)
    return highest + query.clamp(max=0) @ kmin_BKPD.to(wide).transpose(-1, -2)


def logical_pages(position_BKS: Tensor, page_size: int) -> Tensor:
    """Logical page in each slot (the largest position // page_size), -1 where the slot is empty. Shape BKP.

    The maximum is taken in halves: a compiler makes vectors of slots of that, but scalar code of a maximum over a few
    tokens. Page sizes are powers of two: a shift is exact, and much cheaper than a division.
    """
    last_BKPT, tokens = position_BKS.unflatten(-1, (-1, page_size)), page_size
    while tokens > 1:
        # By numbers that a compiler knows, where it does not know how many slots there are.
        tokens //= 2
        last_BKPT = torch.maximum(last_BKPT[..., :tokens], last_BKPT[..., tokens:])
    return last_BKPT[..., 0] >> (page_size.bit_length() - 1)


def page_mass(weights_BKGS: Tensor, page_size: int) -> Tensor:
    """Share of the attention that falls on each page slot, shape BKGP."""
    return weights_BKGS.unflatten(-1, (-1, page_size)).sum(-1)


def top_fraction(score_BKP: Tensor, page_BKP: Tensor, fraction: float) -> Tensor:
    """Mark the ``ceil(fraction * resident)`` best of the resident pages; ties go to the lower page.

    Parameters
    ----------
    page_BKP
        Logical page of each slot, negative where the slot is empty.

    Returns
    -------
    Tensor
        Boolean, shape BKP.
    """
    resident_BKP = page_BKP >= 0
    # The small offset undoes what binary fractions add: 0.3 * 170 pages must count 51, not 52.
    count_BK1 = (resident_BKP.sum(-1, keepdim=True).double() * fraction - 1e-9).ceil()
    return _rank(score_BKP, page_BKP) < count_BK1


def top_pages(score_BKP: Tensor, page_BKP: Tensor, count: int) -> Tensor:
    """Slots of the `count` best resident pages, best first; ties go to the lower page. Shape BKR."""
    return _order(score_BKP, page_BKP)[..., :count]


def _rank(score_BKP: Tensor, page_BKP: Tensor) -> Tensor:
    """Place of each slot in `_order`."""
    if score_BKP.shape[-1] > _COMPARED_AT_ONCE:
        return _order(score_BKP, page_BKP).argsort(-1)
    # A compiler makes one loop of all comparisons, and none of a sort or of `isnan`. NaN is more than infinity.
    broken_BKP, empty_BKP = score_BKP != score_BKP, page_BKP < 0
    score = score_BKP.masked_fill(broken_BKP, torch.inf).masked_fill(empty_BKP, -torch.inf)
    far = torch.iinfo(page_BKP.dtype).max
    page = torch.where(broken_BKP, page_BKP - far // 2, page_BKP).masked_fill(empty_BKP, far)
    mine_BKP1, other_BK1P = (score[..., None], page[..., None]), (score[..., None, :], page[..., None, :])
    tied_BKPP = (other_BK1P[0] == mine_BKP1[0]) & (other_BK1P[1] < mine_BKP1[1])
    # Sums of integers are not vectorised; these are exact in float32.
    return ((other_BK1P[0] > mine_BKP1[0]) | tied_BKPP).sum(-1, dtype=torch.float32)


def _order(score_BKP: Tensor, page_BKP: Tensor) -> Tensor:
    """Slots by falling score, then by rising page; empty slots come last."""
    score = torch.where(page_BKP >= 0, score_BKP, -torch.inf)
    far = torch.iinfo(page_BKP.dtype).max
    by_page = torch.where(page_BKP >= 0, page_BKP, far).argsort(dim=-1, stable=True)
    return by_page.gather(-1, score.gather(-1, by_page).argsort(dim=-1, descending=True, stable=True))


def evictable_pages(page_BKP: Tensor, now_B: Tensor, prompt_B: Tensor, page_size: int, rule: Rule) -> Tensor:
    """Mark the pages that may give way to the token at `now_B`, shape BKP."""
    evictable_BKP = (page_BKP >= 0) & (page_BKP * page_size >= rule.pinned_B[:, None, None])
    if rule.recent_B is not None:
        oldest_B = now_B.div(page_size, rounding_mode="floor") - rule.recent_B
        evictable_BKP = evictable_BKP & (page_BKP <= oldest_B[:, None, None])
    if rule.keeper_B is not None:
        kept_BP = keeper_slots(page_BKP.shape[-1], prompt_B, page_size, rule.keeper_B)
        evictable_BKP = evictable_BKP & ~kept_BP[:, None]
    return evictable_BKP


def keeper_slots(slots: int, prompt_B: Tensor, page_size: int, keeper_B: Tensor) -> Tensor:
    """Mark the first `keeper_B` page slots behind the prompt's, shape BP."""
    first_B = (prompt_B + page_size - 1).div(page_size, rounding_mode="floor")
    behind_BP = torch.arange(slots, device=prompt_B.device) - first_B[:, None]
    return (behind_BP >= 0) & (behind_BP < keeper_B[:, None])


def stamp_used(
    stamp_BKP: Tensor,
    score_BKP: Tensor,
    page_BKP: Tensor,
    now_B: Tensor,
    page_size: int,
    r: float | None,
    alpha: float,
) -> None:
    """Give the pages that were used the stamp `now_B`, in place: RaaS (arXiv 2502.11147, section 3).

    Used are the share `r` of the resident pages with the best scores, or where it is None those that score above
    `alpha`; and the page of the present token.
    """
    now_B11 = now_B[:, None, None]
    used_BKP = score_BKP > alpha if r is None else top_fraction(score_BKP, page_BKP, r)
    used_BKP = used_BKP | (page_BKP == now_B11.div(page_size, rounding_mode="floor"))
    stamp_BKP.copy_(torch.where(used_BKP & (page_BKP >= 0), now_B11.to(stamp_BKP.dtype), stamp_BKP))


def lowest(priority_BKP: Tensor, page_BKP: Tensor, candidates_BKP: Tensor) -> Tensor:
    """Slot of the candidate with the smallest priority; ties go to the lowest logical page. Shape BK.

    NaN counts as the smallest. A slot that is no candidate never wins as long as there is a candidate.
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


def hash_priority(seed: int, page_BKP: Tensor, now_B: Tensor) -> Tensor:
    """Uniform pseudo-random integers that depend only on (seed, KV head, page, step), shape BKP.

    A counter-based generator gives a row the same draws alone and in a batch. With all arithmetic modulo
    2**64, ``mix`` the finaliser of splitmix64 (``z += 0x9E3779B97F4A7C15; z = (z ^ z >> 30) *
    0xBF58476D1CE4E5B9; z = (z ^ z >> 27) * 0x94D049BB133111EB; z ^ z >> 31``, shifts unsigned) and ``h`` the
    index of the KV head: ``x = mix(mix(mix(mix(seed) + h) + page) + now)``, of which the upper 32 bits count.
    """
    heads = torch.arange(page_BKP.shape[1], device=page_BKP.device)[:, None]
    x = _mix(torch.tensor(_signed(seed & _MASK64), device=page_BKP.device))
    x = _mix(x + heads)
    x = _mix(x + page_BKP.long())
    x = _mix(x + now_B[:, None, None])
    return _shift(x, 32)


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right as if the int64 were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def discriminant_scores(
    features_BKSD: Tensor, marked_BKS: Tensor, resident_BKS: Tensor, ridge: float
) -> Tensor:
    """How much each token looks like the marked ones and unlike the rest: a linear discriminant, shape BKS.

    With mean m and covariance C of the resident tokens' features, mean b of the marked ones and D features, the score
    of token x is ``(x - m) . w`` with ``(C + ridge * trace(C) / D * I) w = b - m``: ridge regression of the mark, up
    to a factor. All scores are 0 where nothing is marked or numbers are broken.
    """
    x = features_BKSD.to(wide_dtype(features_BKSD.dtype))
    # Sums over tokens are products with a row of ones and zeros: no copy of the features but the centred one.
    resident, marked = (mask[:, :, None].to(x.dtype) for mask in (resident_BKS, marked_BKS & resident_BKS))
    count = resident.sum(-1, keepdim=True).clamp(min=1)
    x = (x - resident @ x / count).mul_(resident.transpose(2, 3))
    covariance = x.transpose(2, 3) @ x / count
    difference = marked @ x / marked.sum(-1, keepdim=True).clamp(min=1)
    direction = discriminant_direction(covariance, difference.transpose(2, 3), ridge)
    score_BK1S = direction.transpose(2, 3) @ x.transpose(2, 3)
    return score_BK1S[:, :, 0].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def discriminant_direction(covariance_BKDD: Tensor, difference_BKD1: Tensor, ridge: float) -> Tensor:
    """Solve ``(C + ridge * trace(C) / D * I) w = difference`` for w, shape BKD1: see `discriminant_scores`."""
    spread = covariance_BKDD.diagonal(dim1=2, dim2=3).mean(-1, keepdim=True)
    # The tiny number keeps a table of equal tokens from being singular.
    ridge_BKD = (ridge * spread + 1e-30).expand(*covariance_BKDD.shape[:3])
    return torch.linalg.solve_ex(covariance_BKDD + torch.diag_embed(ridge_BKD), difference_BKD1)[0]


def rotate_keys(keys_BKND: Tensor, shift_B: Tensor, inv_freq_D: Tensor) -> Tensor:
    """Turn keys that carry RoPE as if they stood `shift` positions later (half-split layout).

    Parameters
    ----------
    inv_freq_D
        Rotation per position of each of the D / 2 frequency pairs.
    """
    angle = shift_B.to(torch.float64)[:, None] * inv_freq_D.to(torch.float64)
    angle = torch.cat([angle, angle], -1)[:, None, None]
    keys = keys_BKND.to(wide_dtype(keys_BKND.dtype))
    first, second = keys.chunk(2, -1)
    turned = keys * angle.cos().to(keys.dtype) + torch.cat([-second, first], -1) * angle.sin().to(keys.dtype)
    return turned.to(keys_BKND.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores and softmax weights are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
