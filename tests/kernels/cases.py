"""Random slots and pools with everything that may stand in them, and the definition's answer in wide numbers.

Shape suffixes: B rows, K KV heads, G query heads per KV head, P page slots, T tokens in a page, S token slots,
D head dim, X blocks.
"""

import itertools
import random
from typing import NamedTuple

import torch

from longthink.kernels.reference_step import Learn, Pool, Slots

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GARBAGE = float("nan")


class Shape(NamedTuple):
    groups: int = 1
    dim: int = 64
    rows: int = 1
    heads: int = 2
    pages: int = 6
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    shared: bool = False
    seed: int = 0
    offset: int | None = None


def randoms(shape: Shape, *sizes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape.seed * 1000 + len(sizes) + sum(sizes))
    return torch.randn(sizes, generator=generator).to(shape.dtype)


def new_token(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = randoms(shape, shape.rows, shape.heads, shape.groups, shape.dim) * 2
    key, value = randoms(shape, 2, shape.rows, shape.heads, shape.dim)
    return query, key, value


def make_slots(shape: Shape, *, representatives: bool = True) -> Slots:
    """Pages in any order of slots, some slots empty, the tail partly written; what is empty holds NaN."""
    draw = random.Random(shape.seed)
    size, tables = shape.page_size, 1 if shape.shared else shape.heads
    position = torch.full((shape.rows, tables, shape.pages, size), -1, dtype=torch.int32)
    tail = torch.zeros(shape.rows, tables, dtype=torch.int64)
    now = torch.zeros(shape.rows, dtype=torch.int64)
    for row in range(shape.rows):
        last = draw.randrange(shape.pages + 3)
        now[row] = last * size + (draw.randrange(size) if shape.offset is None else shape.offset)
        for table in range(tables):
            slots = draw.sample(range(shape.pages), draw.randint(1, min(shape.pages, last + 1)))
            pages = [last, *draw.sample(range(last), len(slots) - 1)]
            tail[row, table] = slots[0]
            for slot, page in zip(slots, pages, strict=True):
                position[row, table, slot] = page * size + torch.arange(size)
        offset = int(now[row]) % size
        for table in range(tables):
            paged = position[row, table, tail[row, table]]
            paged[offset:] = -1
            if offset == 0:  # another page stands there, and gives way
                paged[:] = torch.arange(size) if draw.random() < 0.8 else -1
    keys, values = randoms(shape, 2, shape.rows, shape.heads, shape.pages, size, shape.dim)
    empty = (position < 0).expand(-1, shape.heads, -1, -1)[..., None]
    keys, values = keys.masked_fill(empty, GARBAGE), values.masked_fill(empty, GARBAGE)
    low = high = None
    if representatives:
        low, high = (
            keys.masked_fill(empty, float("inf")).amin(3),
            keys.masked_fill(empty, -float("inf")).amax(3),
        )
        nothing = empty.all(3)
        low, high = low.masked_fill(nothing, 0), high.masked_fill(nothing, 0)
    return Slots(keys.flatten(2, 3), values.flatten(2, 3), position.flatten(2), tail, now, size, low, high)


def make_pool(shape: Shape, *, representatives: bool = True) -> Pool:
    """Blocks of all rows mixed up in a larger pool; blocks of nobody, and what is not yet written, hold NaN.

    Where each head has a table, a block may hold pages of several rows.
    """
    draw = random.Random(shape.seed)
    size, blocks, tables = shape.page_size, shape.rows * shape.pages + 3, 1 if shape.shared else shape.heads
    length = torch.tensor([draw.randint(1, shape.pages * size) for _ in range(shape.rows)])
    if shape.offset is not None:
        length = (length - 1) // size * size + 1 + shape.offset
    orders = [draw.sample(range(blocks), shape.rows * shape.pages) for _ in range(tables)]
    table = torch.tensor(orders, dtype=torch.int32).view(tables, shape.rows, shape.pages).transpose(0, 1)
    keys, values = torch.full((2, blocks, size, shape.heads, shape.dim), GARBAGE, dtype=shape.dtype)
    low, high = torch.zeros(2, blocks, shape.heads, shape.dim, dtype=shape.dtype)
    old = randoms(shape, 2, shape.rows, shape.pages, size, shape.heads, shape.dim)
    for row, head in itertools.product(range(shape.rows), range(shape.heads)):
        used, own = int(length[row]) - 1, table[row, head * tables // shape.heads]
        for page in range(-(-used // size)):
            here = min(size, used - page * size)
            at = (int(own[page]), slice(here), head)
            keys[at], values[at] = old[0, row, page, :here, head], old[1, row, page, :here, head]
            low[at[0], head], high[at[0], head] = keys[at].amin(0), keys[at].amax(0)
    for row in range(shape.rows):
        table[row, :, -(-int(length[row]) // size) :] = -1
    return Pool(keys, values, table, length, *((low, high) if representatives else ()))


def copied(cache, dtype=None):
    """Copy every tensor; numbers in another dtype if one is given."""

    def copy(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(dtype, copy=True) if dtype is not None and x.is_floating_point() else x.clone()

    return type(cache)(*(copy(x) for x in cache))


def clean(cache):
    """Put zeros where nothing is: the definition reads through a mask of weights, as the cache's own slots allow."""
    return type(cache)(
        *(x.nan_to_num(0.0) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in cache)
    )


def make_learn(kind: str, cache, shape: Shape, alpha: float = 0.05) -> Learn:
    state = None
    if kind in ("marks", "heavy"):
        size = (shape.rows, shape.heads, shape.pages * shape.page_size)
        old = torch.rand(size, generator=torch.Generator().manual_seed(shape.seed))
        state = (old < 0.2).to(torch.int8) if kind == "marks" else old
    return Learn(kind, state, alpha, shape.page_size // 2 + shape.seed % 20)
