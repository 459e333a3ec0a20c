"""Reference kernels against the formula, written out slowly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longthink import kernels
from longthink.kernels import compiled
from longthink.kernels.reference import masked_softmax
from longthink.policies.milestone import discriminant_scores
from longthink.policies.random import draws
from longthink.policies.streaming_llm import rotate_keys


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def naive_attention(query, keys, values, allowed, scaling):
    """One query vector over the allowed keys, in Python floats."""
    logits = [
        scaling * sum(a * b for a, b in zip(query, key, strict=True)) if ok else -math.inf
        for key, ok in zip(keys, allowed, strict=True)
    ]
    top = max(logits)
    weights = [math.exp(x - top) if x > -math.inf else 0.0 for x in logits]
    total = sum(weights)
    weights = [w / total for w in weights]
    out = [sum(w * v[d] for w, v in zip(weights, values, strict=True)) for d in range(len(values[0]))]
    return out, weights


@pytest.mark.parametrize("groups", [1, 2, 4, 7])
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("module", [kernels, compiled], ids=["eager", "compiled"])
def test_decode_attention(groups, with_weights, module):
    query = torch.randn(2, 3, groups, 8, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 3, 11, 8, dtype=torch.float64)
    resident = torch.rand(2, 3, 11) < 0.6
    resident[..., 0] = True
    out, weights = module.decode_attention(query, keys, values, resident, 0.3, with_weights=with_weights)
    assert (weights is not None) == with_weights
    for b in range(2):
        for k in range(3):
            for g in range(groups):
                slow, slow_weights = naive_attention(
                    query[b, k, g].tolist(),
                    keys[b, k].tolist(),
                    values[b, k].tolist(),
                    resident[b, k].tolist(),
                    0.3,
                )
                assert out[b, k, g].tolist() == pytest.approx(slow, abs=1e-9)
                if weights is not None:
                    assert weights[b, k, g].tolist() == pytest.approx(slow_weights, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16])
def test_what_a_compiler_gets_is_the_same_in_narrow_formats_and_with_an_empty_row(dtype, query_dtype):
    query, (keys, values) = torch.randn(2, 2, 3, 8).to(query_dtype), torch.randn(2, 2, 2, 11, 8).to(dtype)
    resident = torch.rand(2, 2, 11) < 0.6
    resident[1] = False
    out, weights = compiled.decode_attention(query, keys, values, resident, 0.3, with_weights=True)
    wide = (x.double() for x in (query, keys, values))
    wanted, wanted_weights = kernels.decode_attention(*wide, resident, 0.3, with_weights=True)
    assert out.dtype == query_dtype and not out[1].any() and not weights[1].any()
    torch.testing.assert_close(weights.double(), wanted_weights, atol=1e-6, rtol=1e-5)
    exact = 2**-8 if query_dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(out.double(), wanted, atol=exact, rtol=2 * exact)


@pytest.mark.parametrize("tables", [1, 3], ids=["one table", "a table for each head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pool_is_read_in_place(tables, dtype):
    pages, tokens, heads, groups, dim = 3, 4, 3, 2, 8
    query = torch.randn(2, heads, groups, dim, dtype=dtype)
    keys, values = torch.randn(2, 9, tokens, heads, dim).to(dtype)
    block = torch.stack([torch.randperm(8)[:pages] for _ in range(2 * tables)]).view(2, tables, pages)
    length = torch.tensor([9, 3])
    # Behind a row's tokens there are others' blocks, with anything in them.
    keys[8], values[8] = torch.nan, torch.inf
    block[1, :, 1:] = 8
    out = compiled.paged_attention(query, kernels.PagedKV(keys, values, block, length), 0.3)
    assert out.dtype == dtype
    exact = 2**-8 if dtype == torch.bfloat16 else 1e-9
    for b in range(2):
        for k in range(heads):
            own = block[b, k % tables]
            held_keys, held_values = (
                x[own, :, k].flatten(0, 1)[: length[b]].tolist() for x in (keys, values)
            )
            for g in range(groups):
                here = [True] * int(length[b])
                slow, _ = naive_attention(query[b, k, g].tolist(), held_keys, held_values, here, 0.3)
                assert out[b, k, g].tolist() == pytest.approx(slow, abs=exact, rel=exact)


@pytest.mark.parametrize("by_feature", [False, True], ids=["token by token", "feature by feature"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_discriminant_is_the_ridge_regression_of_its_definition(dtype, by_feature):
    features = (torch.randn(2, 3, 40, 8) * torch.arange(1, 9) + 5).to(dtype)
    marked, resident = torch.rand(2, 3, 40) < 0.2, torch.rand(2, 3, 40) < 0.8
    marked[0, 1], resident[1, 2], features[1, 0, 3] = False, False, torch.nan
    if by_feature:
        features = features.transpose(2, 3).contiguous().transpose(2, 3)
    found = discriminant_scores(features, marked, resident, 0.003)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = 1e-9 if dtype == torch.float64 else 1e-3
    for row in range(2):
        for head in range(3):
            x, here = features[row, head].double(), resident[row, head]
            chosen = here & marked[row, head]
            wanted = torch.zeros(40, dtype=torch.float64)
            if chosen.any() and not x.isnan().any():
                centred = (x - x[here].mean(0)) * here[:, None]
                covariance = centred.T @ centred / here.sum()
                ridge = 0.003 * covariance.trace() / 8 * torch.eye(8, dtype=torch.float64)
                wanted = centred @ torch.linalg.solve(covariance + ridge, centred[chosen].mean(0))
                assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(found[row, head].double(), wanted, atol=exact, rtol=exact)


def test_block_attention_and_column_mass():
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    query, key, value = query.double(), key.double(), value.double()
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    out = kernels.block_attention(query, key, value, None, 0.5)
    torch.testing.assert_close(out, kernels.block_attention(query, key, value, mask, 0.5))
    readers = torch.tensor([[False, True, True, True, True, True]])
    mass = kernels.column_mass(query, key, mask, readers, 0.5)
    for k in range(2):
        expected = [0.0] * 6
        for h in (2 * k, 2 * k + 1):
            for q in range(6):
                slow, weights = naive_attention(
                    query[0, h, q].tolist(),
                    key[0, k].tolist(),
                    value[0, k].tolist(),
                    mask[0, 0, q].tolist(),
                    0.5,
                )
                assert out[0, h, q].tolist() == pytest.approx(slow, abs=1e-9)
                if q > 0:
                    expected = [e + w for e, w in zip(expected, weights, strict=True)]
        assert mass[0, k].tolist() == pytest.approx(expected, abs=1e-9)


def test_column_mass_in_slices_equals_one_piece(monkeypatch):
    query, key = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 30, 8)
    mask = torch.ones(30, 30, dtype=torch.bool).tril()[None, None]
    readers = torch.rand(2, 30) < 0.8
    whole = kernels.column_mass(query, key, mask, readers, 0.5)
    monkeypatch.setattr("longthink.kernels.reference._QUERIES_AT_ONCE", 7)
    torch.testing.assert_close(kernels.column_mass(query, key, mask, readers, 0.5), whole)


def test_bound_is_the_formula_of_quest_and_bounds_every_key():
    query, keys = torch.randn(1, 2, 3, 16).double(), torch.randn(1, 2, 5, 4, 16).double()
    low, high = keys.amin(3), keys.amax(3)
    bound = kernels.bound_scores(query, low, high)
    q = query[:, :, :, None]
    formula = torch.maximum(q * low[:, :, None], q * high[:, :, None]).sum(-1)
    torch.testing.assert_close(bound, formula)
    exact = torch.einsum("bkgd,bkptd->bkgpt", query, keys).amax(-1)
    assert (bound >= exact - 1e-9).all()


@given(st.data())
def test_top_fraction_and_lowest_against_sorting(data):
    count = data.draw(st.integers(1, 12))
    pages = data.draw(st.permutations(range(count)))
    resident = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    scores = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    fraction = data.draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]))
    page = torch.tensor([[[p if r else -1 for p, r in zip(pages, resident, strict=True)]]])
    score = torch.tensor([[scores]], dtype=torch.float32)

    ranked = sorted((-s, p, i) for i, (s, p, r) in enumerate(zip(scores, pages, resident, strict=True)) if r)
    wanted = {i for _, _, i in ranked[: math.ceil(round(fraction * len(ranked), 9))]}
    marked = kernels.top_fraction(score, page, fraction)[0, 0]
    assert {i for i in range(count) if marked[i]} == wanted
    best = kernels.top_pages(score, page, count)[0, 0].tolist()
    assert best[: len(ranked)] == [i for _, _, i in ranked]

    if ranked:
        victim = kernels.lowest(score, page, page >= 0).item()
        assert (
            victim
            == min((s, p, i) for i, (s, p, r) in enumerate(zip(scores, pages, resident, strict=True)) if r)[2]
        )


def test_lowest_never_names_what_is_no_candidate():
    page = torch.tensor([[[0, 1, 2, 3]]])
    candidates = torch.tensor([[[False, True, True, False]]])
    for bad in (float("nan"), float("inf"), -float("inf")):
        priority = torch.tensor([[[-float("inf"), bad, bad, float("nan")]]])
        assert kernels.lowest(priority, page, candidates).item() == 1
    assert kernels.lowest(torch.full((1, 1, 4), torch.iinfo(torch.int64).max), page, candidates).item() == 1


def test_random_draws_are_splitmix64():
    word = (1 << 64) - 1

    def mix(z):
        z = (z + 0x9E3779B97F4A7C15) & word
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & word
        return z ^ z >> 31

    page, now = torch.tensor([[[3, 0, -1], [1, 2, 7]]], dtype=torch.int32), torch.tensor([40])
    for seed in (0, 1, (1 << 63) - 1):
        got = draws(seed, page, now)
        for head in range(2):
            for slot in range(3):
                x = mix(mix(seed) + head)
                x = mix((x + page[0, head, slot].item()) & word)
                assert got[0, head, slot].item() == mix((x + 40) & word) >> 32


def test_random_draws_are_uniform():
    page = torch.arange(8, dtype=torch.int32).expand(1, 1, 8)
    drawn = [draws(5, page, torch.tensor([step])).argmin().item() for step in range(4000)]
    counts = torch.tensor(drawn).bincount(minlength=8)
    # 4000 draws over 8 pages: 500 each, standard deviation 21.
    assert (counts - 500).abs().max() < 5 * 21


def test_rotated_keys_give_the_dot_products_of_the_new_distance():
    inv_freq = 1.0 / 100 ** (torch.arange(0, 8, 2).double() / 8)

    def turn(x, position):
        return rotate_keys(x[None, None, None], torch.tensor([position]), inv_freq)[0, 0, 0]

    query, key = torch.randn(2, 8, dtype=torch.float64)
    moved = rotate_keys(turn(key, 2)[None, None, None], torch.tensor([5]), inv_freq)[0, 0, 0]
    torch.testing.assert_close(turn(query, 20) @ moved, turn(query, 13) @ key)


def test_masked_softmax_of_nothing_is_zero():
    assert masked_softmax(torch.randn(3), torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pages_are_ranked_the_same_by_comparing_and_by_sorting(dtype, monkeypatch):
    worth = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 0.5, math.inf, math.nan], dtype=dtype)
    score = worth[torch.randint(len(worth), (20, 3, 24))]
    page = torch.stack([torch.randperm(24, dtype=torch.int32) for _ in range(60)]).view(20, 3, 24)
    page = torch.where(torch.rand(20, 3, 24) < 0.3, -1, page)
    compared = [kernels.top_fraction(score, page, fraction) for fraction in (0.0, 0.3, 0.5, 1.0)]
    monkeypatch.setattr(kernels.reference, "_COMPARED_AT_ONCE", 0)
    ranked = [kernels.top_fraction(score, page, fraction) for fraction in (0.0, 0.3, 0.5, 1.0)]
    assert all(torch.equal(one, other) for one, other in zip(compared, ranked, strict=True))
    assert not compared[0].any() and torch.equal(compared[3], page >= 0)
