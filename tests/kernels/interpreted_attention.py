"""The attention kernels against the general route, on random slots. Run by `test_in_interpreter`."""

from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from longthink.accelerators.table import FUSED
from longthink.cache.step import QKV, decode_step
from longthink.cache.store import SlotStore
from longthink.kernels import PagedKV, reference, triton_decode
from longthink.policies import RaaS, make_policy
from tests.kernels.cases import (
    GARBAGE,
    TOLERANCE,
    Shape,
    assert_same,
    changed,
    make_paged,
    make_store,
    name,
    new_token,
    randoms,
    wide,
)

SCALING = 0.2
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32

# Every value of every dimension, and most pairs of values.
STEPS = [
    ("fifo", Shape(groups=1, dim=64, rows=3, seed=8)),
    ("fifo", Shape(groups=8, dim=256, heads=1, pages=4, dtype=BRAIN, seed=3)),
    ("raas", Shape(groups=7, dim=128, dtype=BRAIN, seed=6)),
    ("raas:sharing=layer", Shape(groups=4, dim=80, rows=3, seed=3)),
    ("raas:page_size=8", Shape(groups=2, dim=96, pages=19, dtype=HALF, seed=1)),
    ("raas:page_size=32:used=alpha:alpha=0.05", Shape(groups=2, dim=80, pages=3, dtype=HALF, seed=3)),
    ("raas:used=alpha:alpha=0.05", Shape(groups=1, dim=128, rows=3, heads=1, seed=4)),
    ("raas:used=alpha:alpha=0.05:sharing=layer", Shape(groups=2, pages=9, seed=9)),
    ("raas", Shape(rows=4, heads=1, pages=3, seed=3, offset=0)),
    ("raas:score=exact:sharing=layer", Shape(rows=2, pages=3, seed=3, offset=0)),
    ("raas:score=exact:page_size=4", Shape(groups=7, pages=20, dtype=HALF, seed=9)),
    ("raas:score=exact:used=alpha:alpha=0.1", Shape(groups=4, dim=96, rows=3, dtype=BRAIN, seed=8)),
    ("raas:score=exact", Shape(groups=1, dim=256, heads=1, pages=3, seed=4)),
    ("milestone:alpha=0.05:young=22", Shape(groups=2, rows=4, heads=1, pages=5, seed=3, offset=0)),
    ("milestone:alpha=0.05:young=42", Shape(groups=7, dim=128, rows=3, heads=1, pages=9, seed=2)),
    ("milestone:alpha=0.05:young=44", Shape(groups=4, dtype=HALF, seed=6)),
    ("h2o", Shape(groups=2, dim=128, rows=3, heads=1, pages=40, dtype=BRAIN, seed=2)),
    ("h2o", Shape(groups=8, dim=96, pages=70, seed=3)),
    ("quest:page_size=4", Shape(groups=2, dim=80, rows=3, pages=20, seed=2)),
    ("quest", Shape(groups=7, rows=2, heads=1, dtype=HALF, seed=5, offset=0)),
]
SLOTS = [
    Shape(groups=4, dim=80, rows=2, pages=150, seed=23),
    Shape(groups=8, dim=80, pages=70, dtype=BRAIN, seed=11),
    Shape(groups=2, dim=64, rows=16, heads=1, pages=32, seed=12),
]
PAGED = [
    (Shape(groups=8, dim=64, rows=3, heads=1, dtype=HALF, seed=21), 16),
    (Shape(groups=7, dim=128, pages=20, seed=22), 16),
    (Shape(groups=1, dim=96, rows=2, heads=1, pages=3, seed=27, offset=0), 32),
    (Shape(groups=2, dim=80, rows=2, pages=5, dtype=BRAIN, seed=28), 4),
    (Shape(groups=1, dim=256, pages=40, dtype=HALF, seed=26), 1),
]


class Stepped(NamedTuple):
    """Output of a step, the scores that it gave to pages, if any, and the store behind it."""

    out_BHD: Tensor
    score_BKP: Tensor | None
    store: SlotStore


@pytest.fixture
def scores(monkeypatch):
    """Page scores by which `raas` stamps, those of the latest step last."""
    seen, stamp = [], RaaS.stamp

    def seeing(self, table, score_BKP):
        seen.append(score_BKP.clone())
        stamp(self, table, score_BKP)

    monkeypatch.setattr(RaaS, "stamp", seeing)
    return seen


def near(dtype):
    return {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}


def general(spec, store, new: QKV, scores) -> Stepped:
    """A step of the general route, for which the cache has opened the page of a token at offset 0."""
    policy = make_policy(spec)
    scores.clear()
    store.open_pages(store.tail_BK, store.table.now_B % policy.page_size == 0)
    out_BHD = decode_step(policy, store, new, SCALING)
    return Stepped(out_BHD, scores[0] if scores else None, store)


def fused(spec, store, new: QKV, scores) -> Stepped:
    policy = make_policy(spec)
    scores.clear()
    out_BHD = FUSED[type(policy)](policy).step(store, new, SCALING)
    return Stepped(out_BHD, scores[0] if scores else None, store)


def both(spec, shape, scores, spoil=lambda query, store: None):
    """The step of the general route in float32, and that of the kernels."""
    store, new = make_store(make_policy(spec), shape), new_token(shape)
    spoil(new[0], store)
    wanted = general(spec, wide(store), tuple(x.float() for x in new), scores)
    return wanted, fused(spec, store, new, scores)


def compare(wanted: Stepped, got: Stepped, dtype):
    torch.testing.assert_close(got.out_BHD.float(), wanted.out_BHD, **near(dtype), equal_nan=True)
    assert_same(got.store, wanted.store, learned=TOLERANCE[dtype])
    assert (got.score_BKP is None) == (wanted.score_BKP is None)
    if got.score_BKP is not None:
        empty_BKP = got.store.table.page_BKP < 0
        theirs, mine = (x.score_BKP.masked_fill(empty_BKP, 0) for x in (wanted, got))
        torch.testing.assert_close(mine, theirs, **near(dtype), equal_nan=True)


@pytest.mark.parametrize(("spec", "shape"), STEPS, ids=name)
def test_a_step(spec, shape, scores):
    compare(*both(spec, shape, scores), shape.dtype)


@pytest.mark.parametrize("shape", SLOTS, ids=name)
def test_slots_are_read(shape):
    query = new_token(shape)[0].unflatten(1, (shape.heads, -1))
    keys, values = randoms(shape, 2, shape.rows, shape.heads, shape.pages, shape.dim)
    resident = randoms(shape, shape.rows, shape.heads, shape.pages) < 0
    resident[-1, -1] = False
    keys, values = (x.masked_fill(~resident[..., None], GARBAGE) for x in (keys, values))
    zeroed = (x.float().nan_to_num(0.0) for x in (keys, values))
    wanted, weights = reference.decode_attention(query.float(), *zeroed, resident, SCALING, with_weights=True)
    for with_weights in (True, False):
        out, found = triton_decode.decode_attention(
            query, keys, values, resident, SCALING, with_weights=with_weights
        )
        torch.testing.assert_close(out.float(), wanted, **near(shape.dtype))
        assert not out[-1, -1].any()  # of nothing
        assert (found is not None) == with_weights
        if with_weights:
            torch.testing.assert_close(found, weights, **near(shape.dtype))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("shape", "page_size"), PAGED, ids=name)
def test_blocks_are_read(shape, page_size, shared):
    paged = make_paged(shape, page_size, shared=shared)
    paged.length_B[1:2] = 0
    query = new_token(shape)[0].unflatten(1, (shape.heads, -1))
    zeroed = (x.float().nan_to_num(0.0) for x in (paged.keys_XTKD, paged.values_XTKD))
    wanted = reference.paged_attention(query.float(), PagedKV(*zeroed, *paged[2:]), SCALING)
    out = triton_decode.paged_attention(query, paged, SCALING)
    torch.testing.assert_close(out.float(), wanted, **near(shape.dtype))


@pytest.mark.parametrize("spec", ["raas:score=exact", "raas", "milestone:alpha=0.05", "h2o"])
def test_broken_numbers_stay_in_their_row(spec, scores):
    shape = Shape(groups=2, rows=3, heads=1, seed=31)

    def spoil(query, store):
        query[1] = float("nan")

    (_, whole), (wanted, got) = both(spec, shape, scores), both(spec, shape, scores, spoil)
    compare(wanted, got, FULL)
    assert got.out_BHD[1].isnan().all() and torch.equal(got.out_BHD[0::2], whole.out_BHD[0::2])
    for mine, theirs in zip(got.store.tensors(), whole.store.tensors(), strict=True):
        assert torch.equal(mine[0::2].nan_to_num(7.0), theirs[0::2].nan_to_num(7.0))


@pytest.mark.parametrize(
    "spec",
    ["fifo", "raas", "raas:used=alpha", "raas:score=exact", "milestone:alpha=0.05:young=10", "h2o", "quest"],
)
def test_a_query_head_with_broken_numbers_leaves_the_others_of_its_group(spec, scores):
    shape = Shape(groups=3, heads=1, seed=8)

    def spoil(query, store):
        query[0, 1, 5] = float("inf")

    wanted, got = both(spec, shape, scores, spoil)
    compare(wanted, got, FULL)
    assert got.out_BHD[0, 1].isnan().all() and got.out_BHD[0, 0::2].isfinite().all()


def test_keys_of_minus_infinity_weigh_nothing(scores):
    shape = Shape(groups=2, heads=1, pages=3, seed=33)
    store, new = make_store(make_policy("fifo"), shape), new_token(shape)
    new[0].abs_()
    first = store.table.resident_BKS[0, 0].nonzero()[0]
    store.keys_BKSD[0, 0, first] = -float("inf")
    zeroed = changed(deepcopy(store), lambda x: x.masked_fill(x.isnan(), 0) if x.is_floating_point() else x)
    wanted, got = general("fifo", zeroed, new, scores).out_BHD, fused("fifo", store, new, scores).out_BHD
    assert wanted.isfinite().all()
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_cache_narrower_than_the_model(scores):
    """All pages are stamped: their scores are less exact, and might change places."""
    shape = Shape(groups=2, rows=2, heads=1, dtype=BRAIN, seed=35)
    store = make_store(make_policy("raas:r=1"), shape)
    new = tuple(x.float() + 1e-4 for x in new_token(shape))
    zeroed = changed(deepcopy(store), lambda x: x.nan_to_num(0.0) if x.is_floating_point() else x)
    wanted, got = general("raas:r=1", zeroed, new, scores), fused("raas:r=1", store, new, scores)
    assert got.out_BHD.dtype == wanted.out_BHD.dtype == FULL
    torch.testing.assert_close(got.out_BHD, wanted.out_BHD, atol=1.6e-2, rtol=1.6e-2)
    empty_BKP = got.store.table.page_BKP < 0
    theirs, mine = (x.score_BKP.masked_fill(empty_BKP, 0) for x in (wanted, got))
    torch.testing.assert_close(mine, theirs, atol=0.1, rtol=1.6e-2)
    assert_same(got.store, wanted.store)


@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.5])
def test_marks_at_any_threshold(alpha, scores):
    shape = Shape(groups=2, rows=2, heads=1, pages=20, seed=34)
    compare(*both(f"milestone:alpha={alpha}:young=20", shape, scores), FULL)


@pytest.mark.parametrize(("dim", "groups"), [(64, 4), (80, 1)])
def test_selection_with_equal_bounds(dim, groups, scores):
    shape = Shape(groups=groups, dim=dim, rows=2, heads=1, pages=40, seed=dim)
    now_B = torch.tensor([100, 157])
    for cap in (1, 9, 13, 60):
        store = make_store(make_policy("quest:page_size=4"), shape)
        table = store.table
        table.now_B.copy_(now_B)
        store.tail_BK.copy_(now_B[:, None] // 4)
        position = torch.arange(160, dtype=torch.int32)
        table.position_BKS.copy_(torch.where(position < now_B[:, None, None], position, -1))
        keys, values = randoms(shape, 2, 2, 1, 160, dim)
        keys[:, :, 40:60] = keys[:, :, 20:40]
        store.keys_BKSD.copy_(keys)
        store.values_BKSD.copy_(values)
        store.compute_key_bounds()
        store.set_caps([cap, cap + 3])
        new = new_token(shape)
        wanted = general("quest:page_size=4", wide(store), new, scores)
        compare(wanted, fused("quest:page_size=4", store, new, scores), FULL)
