"""Fast-forward: bring a cache to the state of a long sequence without decoding all of it.

For measurements of time and memory only: keys and values are random, so the tokens that follow are meaningless.

Shape suffixes: B batch rows, K KV heads, N tokens, P page slots, S token slots, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longthink.cache.layer import LayerCache
from longthink.cache.step import evictable_pages
from longthink.cache.store import SlotStore
from longthink.config import check_int
from longthink.errors import CacheStateError, UnsupportedFeatureError
from longthink.policies import grows


def fast_forward(layer: LayerCache, tokens: int, *, heads: int, generator: torch.Generator) -> None:
    """Advance a layer's cache by `tokens` decode steps, as far as time and memory are concerned.

    A cache that grows allocates slots in the same steps as in decoding and fills them with random keys and values. A
    bounded cache takes real decode steps on random inputs until every slot has been rewritten, so that the policy
    determines what it keeps and where; then positions are advanced by whole pages: those of evictable pages and all
    behind them, while the rest stay. One row is advanced and copied to the others. Positions, lengths and slots are
    then those of a decoded cache. Scores and stamps keep their order but not their age; the next steps refresh them.

    Parameters
    ----------
    layer
        A cache after prefill, with rows of equal length.
    tokens
        Tokens to advance, at least 0.
    heads
        Query heads of the layer.
    generator
        Random generator on the device of the cache.

    Raises
    ------
    CacheStateError
        Before prefill, or if rows differ in length.
    UnsupportedFeatureError
        In a cache that grows, if the policy has state or pages are packed: neither can be reconstructed here.
    """
    check_int("tokens", tokens, 0)
    store = layer._store
    if store is None or len(set(layer.rows.lengths)) != 1:
        raise CacheStateError("fast_forward needs a cache after prefill, with rows of equal length")
    if grows(layer.policy):
        _grow(layer, store, tokens, generator)
        return
    page_size, seen = layer.policy.page_size, layer.rows.lengths[0] - int(store.table.prompt_B[0])
    unwritten = max(0, store.table.cap * page_size - seen)
    jump = max(0, tokens - unwritten) // page_size * page_size
    rows = len(layer.rows.lengths)
    layer.select_rows(torch.tensor([0]))
    queried_BHSD = store.keys_BKSD[:, :1].expand(-1, heads, -1, -1)
    query, key, value = (
        random_like(like, tokens - jump, generator)
        for like in (queried_BHSD, store.keys_BKSD, store.values_BKSD)
    )
    for i in range(tokens - jump):
        one = slice(i, i + 1)
        layer.attend(query[:, :, one], key[:, :, one], value[:, :, one])
    if jump:
        _advance_positions(layer, store, jump)
    layer.select_rows(torch.zeros(rows, dtype=torch.int64))


def _grow(layer: LayerCache, store: SlotStore, tokens: int, generator: torch.Generator) -> None:
    if store.table.state or layer.kv_bits is not None:
        has = "has state" if layer.kv_bits is None else "is at few bits"
        raise UnsupportedFeatureError(
            f"policy {layer.policy.name!r} {has} in a cache that grows: decode instead of fast-forwarding"
        )
    rows, page_size, old = len(layer.rows.lengths), layer.policy.page_size, layer.rows.lengths[0]
    new = old + tokens
    # As in decoding, slots are added when a token finds none: the same steps give the same number of slots.
    while store.pages * page_size < new:
        layer._reserve(store.pages * page_size + 1)
    table = store.table
    for tensor in (store.keys_BKSD, store.values_BKSD):
        tensor[:, :, old:new] = random_like(tensor[:, :, :old], tokens, generator)
    table.position_BKS[:, :, old:new] = torch.arange(old, new, device=table.position_BKS.device)
    table.now_B.fill_(new)
    store.tail_BK.fill_((new - 1) // page_size)
    store.compute_key_bounds()
    layer.rows.lengths = [new] * rows


def _advance_positions(layer: LayerCache, store: SlotStore, jump: int) -> None:
    """Advance the positions of evictable pages, and of all behind them, by `jump` tokens (whole pages)."""
    table = store.table
    page_BKP = table.page_BKP
    far = torch.iinfo(page_BKP.dtype).max
    first_BK1 = torch.where(evictable_pages(layer.policy, table), page_BKP, far).amin(-1, keepdim=True)
    advances_BKS = (page_BKP >= first_BK1).repeat_interleave(table.page_size, -1) & table.resident_BKS
    table.position_BKS += advances_BKS * jump
    table.now_B += jump
    layer.rows.lengths = [length + jump for length in layer.rows.lengths]


def random_like(like_BKND: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Random keys or values of the same scale: denormal numbers are slow on some processors."""
    shape = (*like_BKND.shape[:2], tokens, like_BKND.shape[3])
    sample = torch.randn(shape, device=like_BKND.device, dtype=like_BKND.dtype, generator=generator)
    return sample * like_BKND.std().clamp(min=0.1)
