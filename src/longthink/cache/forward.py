"""Fast-forward: the state of a cache far into a text, without decoding all of it.

For measurements of time and memory only: what it holds is made up, so the text that follows means nothing.

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
    """Bring a layer's cache to where `tokens` more decode steps would, as far as time and memory can tell.

    A cache that grows gets all its slots, allocated in the same steps as in decoding, and filled with made-up keys
    and values. A bounded cache takes real decode steps on made-up queries, keys and values until every slot has
    been written anew, so that what it keeps, and how it is laid out, is the policy's own doing; from then on it
    only sets its clock forward by whole pages: what may be evicted moves on with the clock, the rest stays. Its rows
    become alike: one goes forward, and the others are made what it is.
    Positions, lengths and slots are then those of a decoded cache. A policy's scores and stamps keep their order
    and are not made newer; the first steps that follow bring them up to date.

    Parameters
    ----------
    layer
        A cache that has read its prompt, with rows of equal length.
    tokens
        Tokens to go forward, at least 0.
    heads
        Query heads of the layer.
    generator
        Source of the made-up numbers, on the device of the cache.

    Raises
    ------
    CacheStateError
        If there is no prompt yet, or rows differ in length.
    UnsupportedFeatureError
        If the policy keeps a state of its own in a cache that grows: nothing is known about it here.
    """
    check_int("tokens", tokens, 0)
    store = layer._store
    if store is None or len(set(layer._lengths)) != 1:
        raise CacheStateError("fast_forward needs a cache that has read a prompt, with rows of equal length")
    if grows(layer.policy):
        _grow(layer, store, tokens, generator)
        return
    page_size, seen = layer.policy.page_size, layer._lengths[0] - int(store.table.prompt_B[0])
    unwritten = max(0, store.table.cap * page_size - seen)
    jump = max(0, tokens - unwritten) // page_size * page_size
    rows = len(layer._lengths)
    layer.select_rows(torch.tensor([0]))
    queried_BHSD = store.keys_BKSD[:, :1].expand(-1, heads, -1, -1)
    drawn = [
        random_like(like, tokens - jump, generator).split(1, 2)
        for like in (queried_BHSD, store.keys_BKSD, store.values_BKSD)
    ]
    for query, key, value in zip(*drawn, strict=True):
        layer.attend(query, key, value)
    if jump:
        _set_clock(layer, store, jump)
    layer.select_rows(torch.zeros(rows, dtype=torch.int64))


def _grow(layer: LayerCache, store: SlotStore, tokens: int, generator: torch.Generator) -> None:
    if store.table.state:
        raise UnsupportedFeatureError(
            f"policy {layer.policy.name!r} keeps a state of its own while its cache grows: decode instead of "
            "fast-forwarding"
        )
    rows, page_size, old = len(layer._lengths), layer.policy.page_size, layer._lengths[0]
    new = old + tokens
    # Decoding adds slots when a token finds none; the same steps lead to the same number of slots.
    while store.pages * page_size < new:
        layer._reserve(store.pages * page_size + 1)
    table = store.table
    for tensor in (store.keys_BKSD, store.values_BKSD):
        tensor[:, :, old:new] = random_like(tensor[:, :, :old], tokens, generator)
    table.position_BKS[:, :, old:new] = torch.arange(old, new, device=table.position_BKS.device)
    table.now_B.fill_(new)
    store.tail_BK.fill_((new - 1) // page_size)
    store.compute_key_bounds()
    layer._lengths = [new] * rows


def _set_clock(layer: LayerCache, store: SlotStore, jump: int) -> None:
    """Let `jump` tokens, whole pages, pass: what may go, and all behind it, is as much younger."""
    table = store.table
    page_BKP = table.page_BKP
    far = torch.iinfo(page_BKP.dtype).max
    first_BK1 = torch.where(evictable_pages(layer.policy, table), page_BKP, far).amin(-1, keepdim=True)
    moves_BKS = (page_BKP >= first_BK1).repeat_interleave(table.page_size, -1) & table.resident_BKS
    table.position_BKS += moves_BKS * jump
    table.now_B += jump
    layer._lengths = [length + jump for length in layer._lengths]


def random_like(like_BKND: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Return random keys or values, as large as those that are there: tiny numbers are slow on some processors."""
    shape = (*like_BKND.shape[:2], tokens, like_BKND.shape[3])
    drawn = torch.randn(shape, device=like_BKND.device, dtype=like_BKND.dtype, generator=generator)
    return drawn * like_BKND.std().clamp(min=0.1)
