"""Facts about whole runs: memory, determinism, isolation of rows, broken numbers, bfloat16."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from tests.examples import few, some
from tests.oracle.harness import Call, Case, Row, calls
from tests.oracle.strategies import all_cases
from tests.property.facts import UNBOUNDED, kv_bytes_formula, prompts_of


def memory_is_the_closed_formula(case: Case) -> None:
    layer, rows = case.make_layer(), prompts_of(case)
    item_bytes = getattr(torch, case.dtype).itemsize
    metadata_bytes = {}
    for call in calls(case):
        call.attend(layer, case.scaling)
        if call.prefill:
            continue
        for row, tokens in zip(rows, call.real_BQ.sum(1).tolist(), strict=True):
            row.add(tokens, by_user=call.is_turn)
        if case.policy in UNBOUNDED:
            assert layer.kv_bytes >= 2 * int(layer.length_B.max()) * case.kv_heads * case.dim * item_bytes
        else:
            assert layer.kv_bytes == kv_bytes_formula(case, rows, item_bytes)
            # It changes with the slots, that is with a turn, and not while decoding.
            assert metadata_bytes.setdefault(layer.kv_bytes, layer.metadata_bytes) == layer.metadata_bytes


def two_runs_are_equal(case: Case) -> None:
    first, second = case.make_layer(), case.make_layer()
    for call in calls(case):
        outputs = [call.attend(layer, case.scaling) for layer in (first, second)]
        kept = call.real_BQ[:, None, :, None]
        assert torch.equal(*(output.masked_fill(~kept, 0) for output in outputs))
        assert first.resident_positions() == second.resident_positions()


def a_row_is_the_same_alone(case: Case) -> None:
    case = replace(case, chunks=(), style="normal", dtype="float64")
    together = case.make_layer()
    alone = [case.make_layer() for _ in case.prompts]
    for call in calls(case):
        out_BHQD = call.attend(together, case.scaling)
        for row, layer in enumerate(alone):
            columns = call.real_columns(row)
            if not columns[1].shape[1]:
                continue
            width = columns[1].shape[1]
            # A turn of one token would be a decode step if it were not announced.
            announced = width if call.is_turn else 0
            real_BQ = torch.ones(1, width, dtype=torch.bool)
            own = Call(*(tensor[None] for tensor in columns), real_BQ, call.prefill, announced)
            own_HQD = own.attend(layer, case.scaling)[0]
            torch.testing.assert_close(out_BHQD[row][:, call.real_BQ[row]], own_HQD, atol=1e-12, rtol=1e-12)
            assert together.resident_positions()[row] == layer.resident_positions()[0]


def bfloat16_attends_what_it_keeps(case: Case) -> None:
    case = replace(case, dtype="bfloat16", style="normal")
    layer = case.make_layer()
    shadows = [Row(replace(case, dtype="float32")) for _ in case.prompts]
    for call in calls(case):
        out_BHQD = call.attend(layer, case.scaling)
        residents = layer.resident_positions()
        for row, shadow in enumerate(shadows):
            query_HQD, key_KQD, value_KQD = call.real_columns(row)
            shadow.remember(key_KQD, value_KQD)
            if call.prefill or call.real_BQ.shape[1] > 1 or case.policy == "quest":
                continue
            expected_HD = shadow.shadow(query_HQD[:, 0], residents[row])
            torch.testing.assert_close(out_BHQD[row, :, 0].double(), expected_HD, atol=0.05, rtol=0.05)
            assert out_BHQD.dtype == torch.bfloat16


FACTS = [
    memory_is_the_closed_formula,
    two_runs_are_equal,
    a_row_is_the_same_alone,
    bfloat16_attends_what_it_keeps,
]


@pytest.mark.parametrize("fact", FACTS)
def test_fact(fact: Callable[[Case], None]) -> None:
    few(10)(given(all_cases())(fact))()


@pytest.mark.slow
@pytest.mark.parametrize("fact", FACTS)
def test_fact_many_times(fact: Callable[[Case], None]) -> None:
    some(40)(given(all_cases())(fact))()
