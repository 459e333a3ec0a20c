"""Attention kernels against their definition. Run by `test_in_interpreter`."""

import pytest
import torch

from longthink.kernels import reference_step as definition
from longthink.kernels import triton_step
from tests.kernels.cases import TOLERANCE, Shape, clean, copied, make_learn, make_pool, make_slots, new_token

SCALING = 0.2
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32

# Every value of every dimension, and most pairs of values.
SLOTS = [
    ("nothing", Shape(groups=1, dim=64, rows=3, dtype=FULL, seed=1)),
    ("nothing", Shape(groups=8, dim=256, rows=1, heads=1, pages=4, dtype=BRAIN, seed=2)),
    ("bound", Shape(groups=7, dim=128, rows=1, dtype=BRAIN, seed=3)),
    ("bound", Shape(groups=4, dim=80, rows=3, dtype=FULL, shared=True, seed=4)),
    ("bound", Shape(groups=2, dim=96, rows=1, pages=19, page_size=8, dtype=HALF, seed=5)),
    ("bound_share", Shape(groups=2, dim=80, rows=1, page_size=32, pages=3, dtype=HALF, seed=6)),
    ("bound_share", Shape(groups=1, dim=128, rows=3, heads=1, dtype=FULL, seed=7)),
    ("mass", Shape(groups=7, dim=64, rows=1, pages=20, page_size=4, dtype=HALF, seed=8)),
    ("mass", Shape(groups=4, dim=96, rows=3, dtype=BRAIN, shared=True, seed=9)),
    ("mass", Shape(groups=1, dim=256, rows=1, heads=1, pages=3, dtype=FULL, seed=10)),
    ("weights", Shape(groups=8, dim=80, rows=1, page_size=1, pages=70, dtype=BRAIN, seed=11)),
    ("weights", Shape(groups=2, dim=64, rows=16, heads=1, pages=2, dtype=FULL, seed=12)),
    ("marks", Shape(groups=7, dim=128, rows=3, heads=1, pages=9, dtype=FULL, seed=13)),
    ("marks", Shape(groups=4, dim=64, rows=1, dtype=HALF, seed=14)),
    ("heavy", Shape(groups=2, dim=128, rows=3, heads=1, page_size=1, pages=40, dtype=BRAIN, seed=15)),
    ("heavy", Shape(groups=8, dim=96, rows=1, page_size=1, pages=70, dtype=FULL, seed=16)),
]
POOLS = [
    ("nothing", Shape(groups=8, dim=64, rows=3, heads=1, dtype=HALF, seed=21)),
    ("bound", Shape(groups=7, dim=128, rows=1, pages=20, dtype=FULL, seed=22)),
    ("bound_share", Shape(groups=4, dim=96, rows=3, heads=1, dtype=FULL, seed=23)),
    ("mass", Shape(groups=2, dim=80, rows=1, dtype=BRAIN, seed=24)),
    ("mass", Shape(groups=1, dim=64, rows=3, heads=1, pages=9, dtype=FULL, seed=25)),
    ("weights", Shape(groups=1, dim=256, rows=1, pages=4, dtype=HALF, seed=26)),
]


def name(case):
    kind, shape = case
    return f"{kind}-G{shape.groups}-D{shape.dim}-B{shape.rows}-T{shape.page_size}-{str(shape.dtype)[6:]}"


def both(kind, shape, make, spoil=lambda query, cache: None, alpha=0.05):
    """Outputs, scores, states and caches of the definition in float32 and of the kernels."""
    cache = make(shape, representatives="bound" in kind)
    query, key, value = new_token(shape)
    spoil(query, cache)
    slow_cache = clean(copied(cache, torch.float32))
    slow_learn, learn = (make_learn(kind, cache, shape, alpha) for _ in range(2))
    fast_cache = copied(cache)
    slow = definition.step_attention(
        query.float(), key.float(), value.float(), slow_cache, SCALING, slow_learn
    )
    fast = triton_step.step_attention(query, key, value, fast_cache, SCALING, learn)
    return (*slow, slow_learn.state_BKS, slow_cache), (*fast, learn.state_BKS, clean(fast_cache))


def compare(slow, fast, dtype):
    limit = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    for wanted, got in zip(slow[:3], fast[:3], strict=True):
        assert (wanted is None) == (got is None)
        if wanted is not None:
            torch.testing.assert_close(got.to(wanted.dtype), wanted, **limit)
    for wanted, got in zip(slow[3], fast[3], strict=True):
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(got.to(wanted.dtype), wanted, atol=0, rtol=0)


@pytest.mark.parametrize("case", SLOTS, ids=name)
def test_slots(case):
    kind, shape = case
    compare(*both(kind, shape, make_slots), shape.dtype)


@pytest.mark.parametrize("case", POOLS, ids=name)
def test_pool(case):
    kind, shape = case
    compare(*both(kind, shape, make_pool), shape.dtype)
