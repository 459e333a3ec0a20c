"""A later turn: read as one block, in chunks or token by token it is the same; and a rewind takes back what was read.

Shapes: B rows, K KV heads, Q columns, P page slots, S token slots.
"""

import copy
from dataclasses import replace

import pytest
import torch

from longthink.cache import LayerCache
from longthink.cache.rows import PromptPages, RowCounts
from longthink.config import Budget
from longthink.errors import BudgetError
from longthink.policies import Milestone
from tests.oracle.harness import Call, Case, calls
from tests.oracle.test_equalities import assert_same, feed, rows_of
from tests.oracle.test_sinks_inside_the_cache import InsideCache

T, X = True, False  # a token, padding
TURN = ((T, T, X, T, T, T, T), (X, X, X, T, X, T, T), (X, X, X, X, X, X, X))
"""Padding inside and in front, and a row without any token."""
SHAPE = dict(prompts=(9, 3, 7), then=(18, TURN, 30), kv_heads=2, group=2)
PAGE = {"page_size": 4}
MILESTONE = PAGE | {"young": 4, "keep": 0.5, "alpha": 0.2}

PINNED = [
    ("raas", PAGE),
    ("raas", PAGE | {"score": "exact", "sharing": "layer"}),
    ("fifo", PAGE),
    ("random", PAGE),
    ("recency", {}),
    ("h2o", {"pin_prompt": True}),
    ("lazy_eviction", {"alpha": 0.1, "window": 3}),
    ("tri_attention", {"window": 3}),
    ("vase", {"window": 3}),
    ("milestone", MILESTONE),
    ("recall", MILESTONE | {"memory": 10}),
    ("keydiff", {}),
    ("r_kv", {"window": 4, "kernel": 3}),
    ("snapkv", {"window": 4, "kernel": 3}),
    ("tova", {}),
]
UNPINNED = [
    ("raas", PAGE | {"pin_prompt": False}),
    ("h2o", {}),
    ("lazy_eviction", {"alpha": 0.1, "window": 3, "pin_prompt": False}),
    ("streaming_llm", {"positions": "logical"}),
    ("tri_attention", {"window": 3, "pin_prompt": False}),
    ("vase", {"window": 3, "pin_prompt": False}),
    ("r_kv", {"window": 4, "kernel": 3, "pin_prompt": False}),
    ("tova", {"pin_prompt": False, "sharing": "kv_head"}),
]
GROWING = [Case("quest", PAGE, decode_budget=8, **SHAPE), Case("dense", **SHAPE)]
BOUNDED = [
    # The fixed budgets are full when the turn comes, so something has to be evicted for it.
    Case(policy, options, **budget, **SHAPE)
    for policy, options in PINNED + UNPINNED
    for budget in ({"decode_budget": 12}, {"budget": 28})
]
CASES = BOUNDED + GROWING
SLOW = ("keydiff", "lazy_eviction", "r_kv", "tova", "tri_attention", "vase")
"""Policies of single tokens, for which `snapkv` stands in `make test-fast`."""


def some_slow(cases: list[Case]) -> list:
    return [pytest.param(case, marks=pytest.mark.slow) if case.policy in SLOW else case for case in cases]


def by_name(case: Case) -> str:
    kind = "budget" if case.budget else "decode_budget"
    return "-".join([case.policy, *map(str, case.options.values()), kind])


def parts(case: Case) -> tuple[list[Call], Call, list[Call]]:
    """What comes before the turn, the turn, and what comes after it."""
    made = list(calls(case))
    at = next(i for i, call in enumerate(made) if call.is_turn)
    return made[:at], made[at], made[at + 1 :]


def pieces(turn: Call, sizes: list[int]) -> list[Call]:
    """The turn in chunks, of which the first announces them."""
    split = [
        tensor.split(sizes, dim)
        for tensor, dim in (
            (turn.query_BHQD, 2),
            (turn.key_BKQD, 2),
            (turn.value_BKQD, 2),
            (turn.real_BQ, 1),
        )
    ]
    made = [Call(*columns, prefill=False) for columns in zip(*split, strict=True)]
    return [replace(made[0], announces=sum(sizes)), *made[1:]]


def real(out_BHQD: torch.Tensor, turn: Call) -> torch.Tensor:
    return torch.where(turn.real_BQ[:, None, :, None], out_BHQD, 0)


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-12)


def assert_same_state(left: LayerCache, right: LayerCache) -> None:
    """Slots, counts and what the policy has learned."""
    assert_same(left, right)
    assert (left.rows.caps, left.rows.prompts) == (right.rows.caps, right.rows.prompts)
    if left.sizes == right.sizes:
        for mine, theirs in zip(left.store.tensors(), right.store.tensors(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", some_slow(CASES), ids=by_name)
def test_a_turn_in_chunks_equals_the_turn_at_once(case: Case) -> None:
    before, turn, after = parts(case)
    whole = case.make_layer()
    feed(whole, before)
    chunkings = [(sizes, copy.deepcopy(whole)) for sizes in ([1] * 7, [3, 4], [1, 6], [6, 1])]
    turn_BHQD = real(turn.attend(whole, None), turn)
    at_turn = copy.deepcopy(whole)
    after_BHQD = feed(whole, after)
    for sizes, chunked in chunkings:
        close(real(feed(chunked, pieces(turn, sizes)), turn), turn_BHQD)
        assert not chunked.in_chunked_prefill
        assert_same_state(chunked, at_turn)
        close(feed(chunked, after), after_BHQD)
        assert_same_state(chunked, whole)


@pytest.mark.parametrize("case", some_slow(BOUNDED), ids=by_name)
def test_a_block_equals_its_tokens_one_by_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for the block, that is: early in the text where the budget is fixed."""
    case = replace(case, then=(1 if case.budget else 14, TURN, 30))
    before, turn, after = parts(case)
    block, singles = case.make_layer(), case.make_layer()
    feed(block, before)
    feed(singles, before)
    steps = []
    decode = LayerCache._decode_active
    monkeypatch.setattr(LayerCache, "_decode_active", lambda *args: steps.append(1) or decode(*args))
    out_BHQD = real(turn.attend(block, None), turn)
    assert not steps, "not read as a block"
    with monkeypatch.context() as patch:
        patch.setattr(RowCounts, "slots_needed", lambda self, counts: [10**9] * len(counts))
        close(real(turn.attend(singles, None), turn), out_BHQD)
    assert len(steps) == 7
    assert_same_state(block, singles)
    close(feed(block, after), feed(singles, after))
    assert_same_state(block, singles)


@pytest.mark.parametrize("case", some_slow(CASES), ids=by_name)
def test_a_row_of_a_turn_is_the_same_alone(case: Case) -> None:
    """For the row without tokens there is no turn."""
    before, turn, after = parts(case)
    together = case.make_layer()
    feed(together, before)
    out_BHQD = turn.attend(together, None)
    after_BHQD = feed(together, after)
    for row in range(3):
        alone = case.make_layer()
        feed(alone, [rows_of(call, [row]) for call in before])
        mine = rows_of(turn, [row])
        if mine.real_BQ.shape[1]:
            close(out_BHQD[row : row + 1][:, :, turn.real_BQ[row]], mine.attend(alone, None))
        close(after_BHQD[row : row + 1], feed(alone, [rows_of(call, [row]) for call in after]))
        assert together.resident_positions()[row] == alone.resident_positions()[0]


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize(("policy", "options"), PINNED)
def test_the_prompts_of_all_turns_stay_and_the_bound_grows_by_their_pages(
    policy: str, options: dict, turns: int
) -> None:
    one = ((T,) * 6,)
    case = Case(
        policy, options, decode_budget=8, prompts=(7,), then=(21, one, 30, *[one, 60][: 2 * turns - 2])
    )
    layer, prompts, length = case.make_layer(), set(), 0
    size = layer.policy.page_size
    for call in calls(case):
        call.attend(layer, None)
        columns = call.real_BQ.shape[1]
        if call.prefill or call.is_turn:
            prompts |= {p // size for p in range(length, length + columns)}
        length += columns
        (kept,) = layer.resident_positions()[0]
        assert {p for p in range(length) if p // size in prompts} <= set(kept)
        assert len(kept) <= len(prompts) * size + 8
    assert layer.num_evicted > 20
    assert layer.kv_bytes == 2 * (len(prompts) * size + 8) * 4 * 8


@pytest.mark.parametrize(("policy", "options"), PINNED)
def test_a_turn_that_does_not_fit_changes_nothing(policy: str, options: dict) -> None:
    case = Case(policy, options, budget=24, prompts=(9, 3), then=(14, ((T,) * 15,) * 2, 30), kv_heads=2)
    before, turn, after = parts(case)
    refused, plain = case.make_layer(), case.make_layer()
    feed(refused, before)
    feed(plain, before)
    held = [tensor.clone() for tensor in refused.store.tensors()]
    counts = copy.deepcopy(refused.rows)
    with pytest.raises(
        BudgetError, match=r"(?s)budget=24 holds \d+ pages .* for prompts of \d+ tokens. Give budget >="
    ):
        turn.attend(refused, None)
    for tensor, old in zip(refused.store.tensors(), held, strict=True):
        assert torch.equal(tensor, old)
    assert vars(refused.rows) == vars(counts)
    assert torch.equal(feed(refused, after), feed(plain, after))
    assert_same_state(refused, plain)


# Rewinds --------------------------------------------------------------------------------------------------------

LEARNS = ("raas", "h2o", "lazy_eviction", "milestone", "r_kv", "recall", "snapkv", "tova", "vase")
"""Their state is that of a text that was read, so they agree only until something is evicted."""


@pytest.mark.parametrize("case", some_slow([case for case in CASES if not case.budget]), ids=by_name)
@pytest.mark.parametrize("dropped", [2, 5, 9])
def test_a_rewind_before_any_eviction_takes_everything_back(case: Case, dropped: int) -> None:
    steps = 12 if case.policy in LEARNS else 60
    case = replace(case, then=(3, dropped, TURN, steps), decode_budget=case.decode_budget and 28)
    before, turn, after = parts(case)
    kept, gone = before[:-dropped], before[-dropped:]
    rewound, plain = case.make_layer(), case.make_layer()
    feed(plain, kept)
    feed(rewound, [*kept, *gone[:-2], *gone[-2:]])
    # The last row was not padding: it goes on from where it is.
    lengths = [*plain.rows.lengths[:2], rewound.rows.lengths[2]]
    rewound.rewind(lengths)
    close(real(turn.attend(rewound, None), turn)[:2], real(turn.attend(plain, None), turn)[:2])
    close(feed(rewound, after)[:2], feed(plain, after)[:2])
    assert rewound.resident_positions()[:2] == plain.resident_positions()[:2]
    assert rewound.rows.caps[:2] == plain.rows.caps[:2]
    if case.policy in ("fifo", "recency", "random", "streaming_llm"):
        assert plain.num_evicted > 0


@pytest.mark.parametrize("case", some_slow(BOUNDED), ids=by_name)
def test_a_rewind_leaves_nothing_in_the_slots_of_what_it_drops(case: Case) -> None:
    before, turn, after = parts(case)
    layer = case.make_layer()
    feed(layer, [*before, turn, *after])
    kept = layer.resident_positions()
    layer.rewind([length - 17 for length in layer.rows.lengths])
    store, table = layer.store, layer.store.table
    for row, length in enumerate(layer.rows.lengths):
        assert layer.resident_positions()[row] == [[p for p in kept_S if p < length] for kept_S in kept[row]]
    for tensor in (store.keys_BKSD, store.values_BKSD, store.user_BKP, *table.state.values()):
        empty = ~table.resident_BKS if tensor.shape[2] == table.position_BKS.shape[2] else table.page_BKP < 0
        assert empty.any()
        assert not tensor[empty.expand(tensor.shape[:3])].any()
    if layer.policy.pins_prompt():
        counts = table.user_BKP.sum(-1)
        assert counts.amin(1).tolist() == counts.amax(1).tolist() == [p.count for p in layer.rows.prompts]


def test_dropped_turns_no_longer_count() -> None:
    """Two turns are dropped at once, with the answer between them."""
    one = ((T,) * 5,)
    case = Case("fifo", PAGE, decode_budget=40, prompts=(6,), then=(7, one, 7, one, 7, one, 60))
    made = list(calls(case))
    rewound, plain = case.make_layer(), case.make_layer()
    feed(rewound, made[:24])
    feed(plain, made[:8])
    rewound.rewind([13])
    close(feed(rewound, made[24:]), feed(plain, made[24:]))
    assert rewound.resident_positions() == plain.resident_positions()
    assert rewound.rows.caps == plain.rows.caps == [2 + 2 + 10]


def test_pages_of_prompts() -> None:
    pages = PromptPages().extended(0, 6, 4).extended(13, 5, 4).extended(18, 1, 4)
    assert (pages.ranges, pages.count) == (((0, 2), (3, 5)), 4)
    assert pages.extended(19, 0, 4) == pages
    assert pages.extended(20, 1, 4).ranges == ((0, 2), (3, 6))
    assert pages.before(4).ranges == ((0, 2), (3, 4))
    assert pages.before(3).ranges == ((0, 2),)
    assert pages.before(9) == pages


def test_slots_that_moved_tokens_take_after_a_rewind_count() -> None:
    """A policy may have scattered what is left over more slots than the text has pages."""
    rows = RowCounts(Milestone(page_size=4), Budget(decode_budget=40))
    rows.add_prompt([4], [11])
    rows.lengths = [200]
    rows.rewind([16], [9])
    assert rows.slots_needed([9]) == [12]
    assert [rows.add_token() for _ in range(9)] == [False, None, None, None, False, None, None, None, True]


@pytest.mark.parametrize("turn", [False, True])
def test_a_rewind_far_back_endangers_no_prompt(turn: bool) -> None:
    """What is left of milestone's keepers stands in more slots than the text has pages."""
    flags = ((T,) * 13,)
    options = PAGE | {"young": 4, "keep": 0.9, "alpha": 0.0}
    case = Case("milestone", options, decode_budget=40, prompts=(4,), then=(300, flags, 80), seed=3)
    before, block, after = parts(case)
    layer = case.make_layer()
    feed(layer, before)
    (kept,) = layer.resident_positions()[0]
    early = next(length for length in range(5, 300) if sum(p < length for p in kept) >= 12)
    layer.rewind([early])
    for call in [*([block] if turn else []), *after]:
        call.attend(layer, None)
        (kept,) = layer.resident_positions()[0]
        assert {0, 1, 2, 3} <= set(kept)
        assert set(range(early, early + 13 * turn)) <= set(kept) or not turn
        length = layer.rows.lengths[0]
        assert set(range(length - 1 - (length - 1) % 4, length)) - set(range(early)) <= set(kept)


# Keys that are shifted --------------------------------------------------------------------------------------------

SINKS = InsideCache("streaming_llm", {"sinks": 4}, budget=9, prompts=(2,), then=(((T,) * 6,), 40), kv_heads=2)


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1]], ids=str)
def test_first_tokens_may_come_in_a_later_turn(sizes: list[int]) -> None:
    before, turn, after = parts(SINKS)
    whole, chunked = SINKS.make_layer(), SINKS.make_layer()
    feed(whole, before)
    feed(chunked, before)
    out_BHQD = turn.attend(whole, None)
    close(feed(chunked, pieces(turn, sizes)), out_BHQD)
    # With a fixed budget and no prompt to protect, the turn is a number of decode steps.
    plain = SINKS.make_layer()
    feed(plain, before)
    first, *others = pieces(turn, [1] * 6)
    close(feed(plain, [replace(first, announces=0), *others]), out_BHQD)
    after_BHQD = feed(whole, after)
    close(feed(chunked, after), after_BHQD)
    close(feed(plain, after), after_BHQD)
    assert whole.num_evicted > 20


@pytest.mark.parametrize("length", [1, 3, 4])
def test_a_row_that_is_cut_inside_its_first_tokens_reads_them_as_written(length: int) -> None:
    case = replace(SINKS, prompts=(4,))
    before, turn, after = parts(case)
    rewound, plain = case.make_layer(), case.make_layer()
    feed(rewound, [*before, *after])
    rewound.rewind([length])
    feed(plain, [rows_of(before[0], [0])])
    plain.rewind([length])
    close(turn.attend(rewound, None), turn.attend(plain, None))
    close(feed(rewound, after), feed(plain, after))
