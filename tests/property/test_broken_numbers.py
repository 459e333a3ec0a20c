"""A NaN or an infinity does no harm beyond the token that brought it: it goes when that token goes."""

import itertools
from collections.abc import Mapping

import pytest
import torch

from tests.grids import covering, slow_but
from tests.oracle.harness import Case, calls

POLICIES = [
    ("fifo", {"page_size": 1}),
    ("fifo", {"page_size": 4}),
    ("random", {"page_size": 4}),
    ("recency", {}),
    ("h2o", {}),
    ("lazy_eviction", {"alpha": 0.1, "window": 2}),
    ("streaming_llm", {"positions": "logical"}),
    ("keydiff", {}),
    ("r_kv", {"window": 2}),
    ("snapkv", {"window": 2, "pooling": "max"}),
    ("tova", {}),
    ("raas", {"page_size": 4}),
    ("raas", {"page_size": 4, "score": "exact"}),
    ("raas", {"page_size": 4, "used": "alpha", "alpha": 0.1, "pin_prompt": False}),
    ("tri_attention", {"window": 2}),
    ("vase", {"window": 2}),
]
POISONED_CALL = 5
GRID = (POLICIES, ("key_BKQD", "value_BKQD"), (torch.nan, torch.inf, -torch.inf))


@pytest.mark.parametrize(("chosen", "field", "number"), slow_but(itertools.product(*GRID), *covering(*GRID)))
def test_outputs_are_finite_again_after_the_eviction(
    chosen: tuple[str, Mapping[str, object]], field: str, number: float
) -> None:
    policy, options = chosen
    case = Case(policy, options, decode_budget=8, prompts=(6, 3), then=(40,), kv_heads=2, seed=1)
    layer = case.make_layer()
    for step, call in enumerate(calls(case)):
        if step == POISONED_CALL:
            getattr(call, field)[0, 0, 0, 0] = number
        out_BHQD = call.attend(layer, None)
        position = case.prompts[0] + POISONED_CALL - 1
        if position not in layer.resident_positions()[0][0]:
            assert out_BHQD[0, 0].isfinite().all()
        assert out_BHQD[0, 1].isfinite().all(), "another KV head"
        assert out_BHQD[1][:, call.real_BQ[1]].isfinite().all(), "another row"


@pytest.mark.parametrize(("policy", "options"), POLICIES)
def test_queries_that_are_not_numbers_leave_pinned_pages_and_tail(
    policy: str, options: Mapping[str, object]
) -> None:
    case = Case(policy, options, decode_budget=8, prompts=(6, 3), then=(40,), kv_heads=2, group=2, seed=1)
    layer = case.make_layer()
    for step, call in enumerate(calls(case)):
        if step > 0:
            call.query_BHQD.fill_((float("nan"), float("inf"), float("-inf"), 1e300)[step % 4])
        call.attend(layer, None)
        for row, prompt in enumerate(case.prompts):
            for kept in layer.resident_positions()[row]:
                assert prompt + step - 1 in kept
                if layer.policy.pins_prompt():
                    assert set(range(prompt)) <= set(kept)


def test_a_broken_prompt_token_stays_pinned() -> None:
    case = Case("raas", {"page_size": 4}, decode_budget=8, prompts=(6, 3), then=(30,), kv_heads=2)
    layer = case.make_layer()
    for call in calls(case):
        if call.prefill:
            call.key_BKQD[0, 0, 2] = torch.nan
        call.attend(layer, None)
    assert layer.resident_positions()[0][0][:6] == [0, 1, 2, 3, 4, 5]
    assert len(layer.resident_positions()[0][0]) <= 8 + 8
