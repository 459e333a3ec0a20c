"""Random slots and pools with everything that may stand in them; what is empty holds NaN.

Shape suffixes: B rows, K KV heads, G query heads per KV head, P page slots, T tokens in a page, S token slots,
D head dim, X blocks.
"""

import itertools
import random
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from longthink.cache.step import QKV
from longthink.cache.store import SlotStore
from longthink.kernels import PagedKV
from longthink.policies import Policy, grows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GARBAGE = float("nan")


class Shape(NamedTuple):
    """Sizes of a layer. `offset` is the new token's place in its page, None for any; `dtype` that of the cache."""

    groups: int = 1
    dim: int = 64
    rows: int = 1
    heads: int = 2
    pages: int = 6
    dtype: torch.dtype = torch.float32
    seed: int = 0
    offset: int | None = None


def name(case: object) -> str:
    """Part of a test's name."""
    return "-".join(str(x).removeprefix("torch.") for x in (case if isinstance(case, Shape) else (case,)))


def randoms(shape: Shape, *sizes: int) -> Tensor:
    generator = torch.Generator().manual_seed(shape.seed * 1000 + len(sizes) + sum(sizes))
    return torch.randn(sizes, generator=generator).to(shape.dtype)


def new_token(shape: Shape) -> QKV:
    query = randoms(shape, shape.rows, shape.heads * shape.groups, shape.dim) * 2
    key, value = randoms(shape, 2, shape.rows, shape.heads, shape.dim)
    return query, key, value


def make_store(policy: Policy, shape: Shape) -> SlotStore:
    """Pages in any order of slots, some slots empty, the tail partly written, and any state.

    The tail of a token at offset 0 is not opened yet: it may hold the page that gives way. In a cache that grows,
    slot p holds page p.
    """
    draw, size = random.Random(shape.seed), policy.page_size
    caps = [draw.randint(1, shape.pages + 2) for _ in range(shape.rows)]
    like = torch.empty(shape.rows, shape.heads, 0, shape.dim, dtype=shape.dtype)
    store = SlotStore(policy, like, caps, shape.pages)
    paged = store.table.position_BKS.unflatten(-1, (-1, size))
    for row in range(shape.rows):
        last = draw.randrange(shape.pages if grows(policy) else shape.pages + 3)
        offset = draw.randrange(size) if shape.offset is None else shape.offset
        store.table.now_B[row] = last * size + offset
        for table in range(paged.shape[1]):
            most = min(shape.pages, last + 1)
            slots = draw.sample(range(shape.pages), draw.randint(max(1, most // 2), most))
            pages = [last, *draw.sample(range(last), len(slots) - 1)]
            if grows(policy):
                slots = pages = [last, *range(last)]
            for slot, page in zip(slots, pages, strict=True):
                paged[row, table, slot] = page * size + torch.arange(size)
            store.tail_BK[row, table] = slots[0]
            paged[row, table, slots[0], offset:] = -1
            if offset == 0 and not grows(policy) and draw.random() < 0.8:
                paged[row, table, slots[0]] = torch.arange(size)
    _fill(store, shape)
    return store


def _fill(store: SlotStore, shape: Shape) -> None:
    """Random numbers where there are tokens, and any state everywhere."""
    table = store.table
    empty_BKS1 = ~table.resident_BKS[..., None]
    for tensor, numbers in zip(
        (store.keys_BKSD, store.values_BKSD), randoms(shape, 2, *store.keys_BKSD.shape), strict=True
    ):
        tensor.copy_(numbers.masked_fill(empty_BKS1, GARBAGE))
    store.compute_key_bounds()
    for bound in (store.kmin_BKPD, store.kmax_BKPD) if store.has_key_bounds else ():
        bound.masked_fill_((table.page_BKP < 0)[..., None], GARBAGE)
    generator = torch.Generator().manual_seed(shape.seed)
    for state in table.state.values():
        old = torch.rand(state.shape, generator=generator)
        state.copy_({torch.int8: old < 0.2, torch.int32: old * 50, torch.float32: old}[state.dtype])


def wide(store: SlotStore) -> SlotStore:
    """Copy the store as the general route may find it: with zeros where nothing is, in float32."""

    def widened(tensor: Tensor) -> Tensor:
        return tensor.float().nan_to_num(0.0) if tensor.is_floating_point() else tensor

    return changed(deepcopy(store), widened)


def changed(store: SlotStore, change: Callable[[Tensor], Tensor]) -> SlotStore:
    """Another store of what `change` makes of each tensor."""
    other = copy(store)
    other.table = replace(store.table)
    other.apply(change)
    return other


def assert_same(got: SlotStore, wanted: SlotStore, *, written: float = 0.0, learned: float = 0.0) -> None:
    """The same tokens in the same slots, the same clock, key bounds and state, as near as is said."""

    def places(store: SlotStore) -> tuple[Tensor, ...]:
        table = store.table
        return store.tail_BK, table.position_BKS, table.now_B, table.prompt_B, table.cap_B

    def contents(store: SlotStore) -> list[Tensor]:
        # What stands where no token is has no meaning.
        kinds = [(~store.table.resident_BKS, store.keys_BKSD, store.values_BKSD)]
        if store.has_key_bounds:
            kinds.append((store.table.page_BKP < 0, store.kmin_BKPD, store.kmax_BKPD))
        return [x.masked_fill(empty[..., None], 0) for empty, *tensors in kinds for x in tensors]

    assert all(map(torch.equal, places(got), places(wanted)))
    for mine, theirs in zip(contents(got), contents(wanted), strict=True):
        torch.testing.assert_close(mine.to(theirs.dtype), theirs, atol=written, rtol=written)
    for name, theirs in wanted.table.state.items():
        near = learned if theirs.is_floating_point() else 0
        torch.testing.assert_close(got.table.state[name], theirs, atol=near, rtol=near, equal_nan=True)


def make_paged(shape: Shape, page_size: int, *, shared: bool = False) -> PagedKV:
    """Blocks of all rows mixed up in a larger pool; blocks of nobody, and what is not yet written, hold NaN.

    Where each head has a table, a block may hold pages of several rows.
    """
    draw = random.Random(shape.seed)
    blocks, tables = shape.rows * shape.pages + 3, 1 if shared else shape.heads
    length = torch.tensor([draw.randint(1, shape.pages * page_size) for _ in range(shape.rows)])
    if shape.offset is not None:
        length = (length - 1) // page_size * page_size + 1 + shape.offset
    orders = [draw.sample(range(blocks), shape.rows * shape.pages) for _ in range(tables)]
    table = torch.tensor(orders, dtype=torch.int32).view(tables, shape.rows, shape.pages).transpose(0, 1)
    keys, values = torch.full((2, blocks, page_size, shape.heads, shape.dim), GARBAGE, dtype=shape.dtype)
    old = randoms(shape, 2, shape.rows, shape.pages, page_size, shape.heads, shape.dim)
    for row, head in itertools.product(range(shape.rows), range(shape.heads)):
        used, own = int(length[row]), table[row, head * tables // shape.heads]
        for page in range(-(-used // page_size)):
            here = min(page_size, used - page * page_size)
            at = (int(own[page]), slice(here), head)
            keys[at], values[at] = old[0, row, page, :here, head], old[1, row, page, :here, head]
    for row in range(shape.rows):
        table[row, :, -(-int(length[row]) // page_size) :] = -1
    return PagedKV(keys, values, table, length)
