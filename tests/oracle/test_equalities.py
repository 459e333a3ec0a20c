"""Runs of the library that must equal other runs of the library, oracle or not."""

from dataclasses import replace

import pytest
import torch

from longthink.cache import LayerCache
from longthink.errors import BudgetError
from tests.oracle.harness import Call, Case, calls

PINNED = [
    Case("raas", {"page_size": 4}, decode_budget=8, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("fifo", {"page_size": 4}, budget=20, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("random", {"page_size": 4}, decode_budget=8, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("recency", {}, decode_budget=6, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("h2o", {"pin_prompt": True}, decode_budget=6, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("lazy_eviction", {"window": 2}, decode_budget=6, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("tri_attention", {"window": 2}, decode_budget=6, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("vase", {"window": 2}, decode_budget=6, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("keydiff", {}, decode_budget=6, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("r_kv", {"window": 2}, decode_budget=6, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("snapkv", {"window": 2}, decode_budget=6, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("tova", {}, decode_budget=6, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("quest", {"page_size": 4}, budget=8, prompts=(9, 3), then=(14,), kv_heads=2, group=2),
    Case("dense", prompts=(9, 3), then=(14,), kv_heads=2, group=2),
]
CUTTING = [
    Case("raas", {"page_size": 4, "pin_prompt": False}, budget=8, prompts=(9, 3), then=(14,), kv_heads=2),
    Case("h2o", {}, budget=7, prompts=(9, 3), then=(14,), kv_heads=2),
    Case(
        "lazy_eviction", {"window": 2, "pin_prompt": False}, budget=7, prompts=(9, 3), then=(14,), kv_heads=2
    ),
    Case(
        "tri_attention", {"window": 2, "pin_prompt": False}, budget=7, prompts=(9, 3), then=(14,), kv_heads=2
    ),
    Case("vase", {"window": 2, "pin_prompt": False}, budget=7, prompts=(9, 3), then=(14,), kv_heads=2),
    Case("streaming_llm", {"positions": "logical"}, budget=7, prompts=(9, 3), then=(14,), kv_heads=2),
    Case("snapkv", {"pin_prompt": False}, budget=7, prompts=(9, 3), then=(14,), kv_heads=2),
]


def by_policy(case: Case) -> str:
    return "-".join([case.policy, *case.options])


def joined(parts: list[Call]) -> Call:
    """One call with the columns of several."""
    fields = ("query_BHQD", "key_BKQD", "value_BKQD")
    columns = [torch.cat([getattr(part, field) for part in parts], dim=2) for field in fields]
    return Call(*columns, torch.cat([part.real_BQ for part in parts], dim=1), parts[0].prefill)


def feed(layer: LayerCache, parts: list[Call]) -> torch.Tensor:
    return torch.cat([part.attend(layer, None) for part in parts], dim=2)


def assert_same(left: LayerCache, right: LayerCache) -> None:
    assert left.resident_positions() == right.resident_positions()
    assert left.length_B.tolist() == right.length_B.tolist()
    assert (left.num_evicted, left.kv_bytes) == (right.num_evicted, right.kv_bytes)


@pytest.mark.parametrize("case", PINNED, ids=by_policy)
@pytest.mark.parametrize("chunks", [(2, 7), (8, 1), (3, 3, 3), (1,) * 9], ids=str)
def test_a_prompt_in_chunks_equals_one_prefill(case: Case, chunks: tuple[int, ...]) -> None:
    prompt, *steps = calls(case)
    whole, chunked = case.make_layer(), case.make_layer()
    prompt.attend(whole, None)
    pieces = [prompt.query_BHQD, prompt.key_BKQD, prompt.value_BKQD, prompt.real_BQ]
    dims = (2, 2, 2, 1)
    split = [tensor.split(list(chunks), dim) for tensor, dim in zip(pieces, dims, strict=True)]
    chunked.begin_chunked_prefill(9)
    for columns in zip(*split, strict=True):
        Call(*columns, prefill=True).attend(chunked, None)
    torch.testing.assert_close(feed(chunked, steps), feed(whole, steps), atol=1e-12, rtol=1e-12)
    assert_same(chunked, whole)


@pytest.mark.parametrize("case", PINNED + CUTTING, ids=by_policy)
def test_padding_inside_a_prompt_changes_nothing(case: Case) -> None:
    prompt, *steps = calls(replace(case, prompts=(9,)))
    torch.manual_seed(0)
    spread_Q = torch.tensor([0, 2, 3, 4, 7, 8, 9, 11, 12])
    real_BQ = torch.zeros(1, 14, dtype=torch.bool)
    real_BQ[:, spread_Q] = True
    columns = []
    for tensor in (prompt.query_BHQD, prompt.key_BKQD, prompt.value_BKQD):
        wide = torch.randn(*tensor.shape[:2], 14, tensor.shape[3], dtype=tensor.dtype)
        columns.append(wide.index_copy(2, spread_Q, tensor))
    plain, holed = case.make_layer(), case.make_layer()
    out_BHQD = Call(*columns, real_BQ, prefill=True).attend(holed, None)
    torch.testing.assert_close(out_BHQD[:, :, spread_Q], prompt.attend(plain, None), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(feed(holed, steps), feed(plain, steps), atol=1e-12, rtol=1e-12)
    assert_same(holed, plain)


@pytest.mark.parametrize("case", PINNED + CUTTING, ids=by_policy)
def test_a_selected_row_goes_on_like_its_source(case: Case) -> None:
    case = replace(case, prompts=(9, 3, 6), then=(20,))
    prompt, *steps = calls(case)
    before, after = [prompt, *steps[:8]], steps[8:]
    chosen = [2, 0, 0]
    layer = case.make_layer()
    feed(layer, before)
    residents = layer.resident_positions()
    layer.select_rows(torch.tensor(chosen))
    assert layer.resident_positions() == [residents[source] for source in chosen]
    out_BHQD = feed(layer, after)
    for row, source in enumerate(chosen):
        alone = case.make_layer()
        feed(alone, [rows_of(call, [source]) for call in before])
        alone_BHQD = feed(alone, [rows_of(call, [row]) for call in after])
        torch.testing.assert_close(out_BHQD[row : row + 1], alone_BHQD, atol=1e-12, rtol=1e-12)
        assert layer.resident_positions()[row] == alone.resident_positions()[0]


def rows_of(call: Call, rows: list[int]) -> Call:
    """The call for some rows only, without the columns that are padding in all of them."""
    real_BQ = call.real_BQ[rows]
    used_Q = real_BQ.any(dim=0)
    columns = (call.query_BHQD, call.key_BKQD, call.value_BKQD)
    return Call(*(tensor[rows][:, :, used_Q] for tensor in columns), real_BQ[:, used_Q], call.prefill)


@pytest.mark.parametrize("case", PINNED + CUTTING, ids=by_policy)
def test_a_reset_layer_is_as_good_as_new(case: Case) -> None:
    case = replace(case, chunks=(4, 5)) if case in PINNED else case
    used, fresh = case.make_layer(), case.make_layer()
    feed(used, list(calls(replace(case, prompts=(4, 7, 2), chunks=(), seed=1))))
    used.reset()
    assert used.kv_bytes == used.metadata_bytes == used.num_evicted == 0
    for call in calls(case):
        real_B1Q1 = call.real_BQ[:, None, :, None]
        assert torch.equal(call.attend(used, None) * real_B1Q1, call.attend(fresh, None) * real_B1Q1)
    assert_same(used, fresh)


@pytest.mark.parametrize("policy", ["raas", "fifo", "random"])
def test_a_prompt_that_leaves_no_free_page_is_refused(policy: str) -> None:
    case = Case(policy, {"page_size": 4}, budget=12, prompts=(9,), then=())
    with pytest.raises(BudgetError, match=r"(?s)12.*9"):
        next(calls(case)).attend(case.make_layer(), None)
    fits = replace(case, prompts=(8,))
    next(calls(fits)).attend(fits.make_layer(), None)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("recency", {}),
        ("h2o", {"pin_prompt": True}),
        ("lazy_eviction", {}),
        ("tri_attention", {}),
        ("vase", {}),
    ],
)
def test_a_prompt_that_leaves_no_free_token_is_refused(policy: str, options: dict) -> None:
    case = Case(policy, options, budget=8, prompts=(8, 2), then=())
    with pytest.raises(BudgetError, match=r"8"):
        next(calls(case)).attend(case.make_layer(), None)
    fits = replace(case, budget=9)
    next(calls(fits)).attend(fits.make_layer(), None)


def test_a_refused_chunk_leaves_the_cache_as_it_was() -> None:
    case = Case("raas", {"page_size": 4}, budget=12, prompts=(4,), then=(30,), kv_heads=2)
    prompt, *steps = calls(case)
    refused, plain = case.make_layer(), case.make_layer()
    for layer in (refused, plain):
        prompt.attend(layer, None)
    with pytest.raises(BudgetError):
        joined(steps[:6]).attend(refused, None)
    assert_same(refused, plain)
    assert torch.equal(feed(refused, steps), feed(plain, steps))
    assert_same(refused, plain)
