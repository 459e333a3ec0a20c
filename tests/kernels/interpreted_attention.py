"""Attention kernels against their definition. Run by `test_in_interpreter`."""

import pytest
import torch

from longthink.kernels import reference, triton_step
from longthink.kernels import reference_step as definition
from longthink.kernels.reference_step import Learn, Slots
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
    ("bound", Shape(groups=1, dim=64, rows=4, heads=1, pages=3, dtype=FULL, seed=17, offset=0)),
    ("mass", Shape(groups=1, dim=64, rows=2, pages=3, dtype=FULL, shared=True, seed=18, offset=0)),
    ("marks", Shape(groups=2, dim=64, rows=4, heads=1, pages=5, dtype=FULL, seed=19, offset=0)),
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
    ("bound", Shape(groups=1, dim=64, rows=2, heads=1, pages=3, dtype=FULL, seed=27, offset=0)),
    ("bound", Shape(groups=2, dim=64, rows=2, pages=5, dtype=FULL, seed=28, shared=True)),
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


def test_plain_attention():
    for with_weights, dtype in ((True, FULL), (False, BRAIN)):
        query, keys, values = (
            new_token(Shape(4, 80, 2, dtype=dtype))[0],
            *torch.randn(2, 2, 2, 150, 80, dtype=dtype),
        )
        resident = torch.rand(2, 2, 150) < 0.5
        resident[1, 1] = False
        slow, slow_weights = reference.decode_attention(
            query.float(), keys.float(), values.float(), resident, SCALING, with_weights=True
        )
        out, weights = triton_step.decode_attention(
            query, keys, values, resident, SCALING, with_weights=with_weights
        )
        assert not out[1, 1].any()  # of nothing
        limit = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(out.float(), slow, **limit)
        if with_weights:
            torch.testing.assert_close(weights, slow_weights, **limit)


@pytest.mark.parametrize("kind", ["mass", "bound", "weights", "marks"])
def test_broken_numbers_stay_in_their_row(kind):
    shape = Shape(groups=2, dim=64, rows=3, heads=1, seed=31)

    def spoil(query, cache):
        query[1] = float("nan")

    wanted, got = both(kind, shape, make_slots), both(kind, shape, make_slots, spoil)
    for clean_result, result in zip(wanted[1][:3], got[1][:3], strict=True):
        if result is not None:
            assert torch.equal(result[0::2], clean_result[0::2])
    assert got[1][0][1].isnan().all()


def test_a_query_head_with_broken_numbers_leaves_the_others_of_its_group():
    shape = Shape(groups=3, dim=64, rows=1, heads=1, seed=32)

    def spoil(query, cache):
        query[0, 0, 1, 5] = float("inf")

    out = both("nothing", shape, make_slots, spoil)[1][0]
    whole = both("nothing", shape, make_slots)[1][0]
    assert out[0, 0, 1].isnan().all() and torch.equal(out[0, 0, 0::2], whole[0, 0, 0::2])


def test_keys_of_minus_infinity_weigh_nothing():
    shape = Shape(groups=2, dim=64, rows=1, heads=1, pages=3, seed=33)

    def spoil(query, cache):
        query.abs_()
        cache.keys_BKSD[0, 0, (cache.position_BKS[0, 0] >= 0).nonzero()[0]] = -float("inf")

    cache = make_slots(shape, representatives=False)
    query, key, value = new_token(shape)
    spoil(query, cache)
    slow = definition.step_attention(query, key, value, copied(cache)._replace(**zeros(cache)), SCALING)[0]
    fast = triton_step.step_attention(query, key, value, copied(cache), SCALING)[0]
    assert slow.isfinite().all()
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def zeros(cache):
    """Keys and values with zeros for NaN, where nothing is."""
    return {
        name: getattr(cache, name).masked_fill(getattr(cache, name).isnan(), 0)
        for name in ("keys_BKSD", "values_BKSD")
    }


@pytest.mark.parametrize("make", [make_slots, make_pool])
def test_a_cache_narrower_than_the_model(make):
    shape = Shape(groups=2, dim=64, rows=2, heads=1, dtype=BRAIN, seed=35)
    new = [x.float() + 1e-4 for x in new_token(shape)]
    cache = make(shape)
    slow_cache, fast_cache = clean(copied(cache)), copied(cache)
    slow, score = definition.step_attention(*new, slow_cache, SCALING, Learn("bound"))
    fast, fast_score = triton_step.step_attention(*new, fast_cache, SCALING, Learn("bound"))
    assert fast.dtype == slow.dtype == torch.float32
    torch.testing.assert_close(fast, slow, atol=1.6e-2, rtol=1.6e-2)
    torch.testing.assert_close(fast_score, score, atol=0.1, rtol=1.6e-2)
    for wanted, got in zip(slow_cache, clean(fast_cache), strict=True):
        assert not isinstance(wanted, torch.Tensor) or torch.equal(got, wanted)


@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.5])
def test_marks_at_any_threshold(alpha):
    shape = Shape(groups=2, dim=64, rows=2, heads=1, pages=20, seed=34)
    compare(*both("marks", shape, make_slots, alpha=alpha), FULL)


@pytest.mark.parametrize("dim, groups", [(64, 4), (80, 1)])
def test_selection(dim, groups):
    shape = Shape(groups=groups, dim=dim, rows=2, heads=1, pages=40, page_size=4, seed=dim)
    keys, values = torch.randn(2, 2, 1, 160, dim)
    keys[:, :, 40:60] = keys[:, :, 20:40]  # pages with equal bounds
    length = torch.tensor([101, 158])
    position = torch.arange(160, dtype=torch.int32).repeat(2, 1, 1)
    position[position > length[:, None, None] - 2] = -1
    paged = keys.masked_fill(position[..., None] < 0, 0).unflatten(2, (40, 4))
    now = length - 1
    slots = Slots(keys, values, position, (now // 4)[:, None], now, 4, paged.amin(3), paged.amax(3))
    for cap in (1, 9, 13, 60):
        slow, fast = copied(slots), copied(slots)
        caps = torch.tensor([cap, cap + 3])
        wanted = definition.select_attention(*new_token(shape), slow, caps, SCALING)
        got = triton_step.select_attention(*new_token(shape), fast, caps, SCALING)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(fast.kmin_BKPD, slow.kmin_BKPD)
