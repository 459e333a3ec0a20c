"""Random cases of every policy: resident sets equal at every step, output equal to masked dense attention."""

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.examples import few, some
from tests.oracle.harness import ROUNDED, Case, compare
from tests.oracle.strategies import (
    all_cases,
    control_cases,
    h2o_cases,
    lazy_eviction_cases,
    milestone_cases,
    raas_cases,
    streaming_cases,
    token_cases,
    tri_attention_cases,
    vase_cases,
    whole_cases,
)

FAMILIES = {
    "raas": raas_cases,
    "controls": control_cases,
    "h2o": h2o_cases,
    "lazy_eviction": lazy_eviction_cases,
    "milestone": milestone_cases,
    "streaming_llm": streaming_cases,
    "tokens": token_cases,
    "tri_attention": tri_attention_cases,
    "vase": vase_cases,
    "whole": whole_cases,
}


def check(case: Case) -> None:
    compared = compare(case)
    decode_calls = sum(part if isinstance(part, int) else 1 for part in case.then)
    complete = compared == decode_calls + max(1, len(case.chunks))
    event(f"{case.policy}, {case.style}: {'complete' if complete else 'cut short by a rounding doubt'}")
    if case.style == "normal" and case.dtype == "float64" and case.policy not in ROUNDED:
        assert complete


@few(25)
@given(all_cases())
def test_a_policy_agrees_with_its_oracle(case: Case) -> None:
    check(case)


@few(25)
@given(raas_cases())
def test_raas_agrees_with_its_oracle(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_agrees_with_its_oracle_many_times(family: str) -> None:
    some(40)(given(FAMILIES[family]())(check))()


@pytest.mark.slow
@some(40)
@given(st.data())
def test_raas_with_r_of_one_is_fifo(data: st.DataObject) -> None:
    case = data.draw(control_cases().filter(lambda case: case.policy == "fifo"))
    as_raas = Case(**{**vars(case), "policy": "raas", "options": {**case.options, "r": 1.0}})
    check(case)
    check(as_raas)
