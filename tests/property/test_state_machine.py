"""Any sequence of decode steps, turns, rewinds, row changes and broken numbers leaves the facts standing.

Every call also goes to a twin that never sees a broken number: rows that were not touched must stay equal to it.
"""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from longthink.errors import BudgetError
from tests.examples import few, some
from tests.oracle.harness import Call, Case, Inputs, calls
from tests.oracle.strategies import all_cases
from tests.property.facts import check_key_bounds, check_layer, prompts_of

BROKEN = (float("nan"), float("inf"), float("-inf"), 1e38)


class CacheMachine(RuleBasedStateMachine):
    @initialize(case=all_cases(), dtype=st.sampled_from(("float64", "float32", "bfloat16")))
    def start(self, case: Case, dtype: str) -> None:
        self.case = replace(case, dtype=dtype, then=())
        self.layer, self.twin = self.case.make_layer(), self.case.make_layer()
        self.rows = len(case.prompts)
        self.facts = prompts_of(self.case)
        self.touched = [False] * self.rows
        for call in calls(self.case):
            call.attend(self.layer, case.scaling)
            call.attend(self.twin, case.scaling)
        self.inputs = Inputs(replace(self.case, seed=case.seed + 1))

    def feed(
        self, real_BQ: torch.Tensor, broken: tuple[int, int, float] | None = None, *, by_user: bool = False
    ) -> None:
        """Give one call to both layers; `broken` names the row, which of q, k, v, and the number to plant."""
        columns = self.inputs.columns(real_BQ.shape[1])
        counts = real_BQ.sum(1).tolist()
        if by_user and not all(row.fits(count) for row, count in zip(self.facts, counts, strict=True)):
            for layer in (self.layer, self.twin):
                with pytest.raises(BudgetError):
                    Call(*columns, real_BQ, prefill=False).attend(layer, self.case.scaling)
            return
        twin_out_BHQD = Call(*columns, real_BQ, prefill=False).attend(self.twin, self.case.scaling)
        if broken is not None:
            row, which, number = broken
            columns = tuple(tensor.clone() for tensor in columns)
            columns[which][row, 0, 0, 0] = number
            self.touched[row] = True
        out_BHQD = Call(*columns, real_BQ, prefill=False).attend(self.layer, self.case.scaling)
        for row, count in enumerate(counts):
            self.facts[row].add(count, by_user=by_user)
            if not self.touched[row]:
                assert torch.equal(out_BHQD[row][:, real_BQ[row]], twin_out_BHQD[row][:, real_BQ[row]])

    @rule(steps=st.integers(1, 9))
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.feed(torch.ones(self.rows, 1, dtype=torch.bool))

    @rule(data=st.data())
    def turn(self, data: st.DataObject) -> None:
        flags = st.lists(st.booleans(), min_size=3, max_size=3)
        self.feed(torch.tensor([data.draw(flags) for _ in range(self.rows)]), by_user=True)

    @rule(columns=st.integers(1, 4))
    def turn_column_by_column(self, columns: int) -> None:
        if not all(row.fits(columns) for row in self.facts):
            return
        for layer in (self.layer, self.twin):
            layer.begin_chunked_prefill(columns)
        for _ in range(columns):
            self.feed(torch.ones(self.rows, 1, dtype=torch.bool), by_user=True)

    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        """Only a turn rewinds rows, and only if it then fits."""
        lengths = [data.draw(st.integers(max(0, row.length - 30), row.length)) for row in self.facts]
        flags = st.lists(st.booleans(), min_size=3, max_size=3)
        real_BQ = torch.tensor([data.draw(flags) for _ in range(self.rows)])
        counts, kept = real_BQ.sum(1).tolist(), self.layer.resident_positions()
        after = copy.deepcopy(self.facts)
        for row, length, kept_K in zip(after, lengths, kept, strict=True):
            row.rewind(length, kept_K)
        if not all(row.fits(count) for row, count in zip(after, counts, strict=True)):
            with pytest.raises(BudgetError):
                self.layer.check_room(lengths, counts, 3)
            return
        self.layer.check_room(lengths, counts, 3)
        for layer in (self.layer, self.twin):
            layer.rewind(lengths)
        for row, (length, kept_K) in enumerate(zip(lengths, kept, strict=True)):
            assert self.layer.resident_positions()[row] == [
                [p for p in kept_S if p < length] for kept_S in kept_K
            ]
        self.facts = after
        self.feed(real_BQ, by_user=True)

    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        """A row becomes a copy of another."""
        row, source = (data.draw(st.integers(0, self.rows - 1)) for _ in range(2))
        for layer in (self.layer, self.twin):
            other = copy.deepcopy(layer)
            other.select_rows(torch.tensor([source]))
            other.release()
            layer.adopt(row, other)
        self.facts[row] = copy.deepcopy(self.facts[source])
        self.touched[row] = self.touched[source]

    @rule(data=st.data(), which=st.integers(0, 2), number=st.sampled_from(BROKEN))
    def decode_a_broken_number(self, data: st.DataObject, which: int, number: float) -> None:
        row = data.draw(st.integers(0, self.rows - 1))
        self.feed(torch.ones(self.rows, 1, dtype=torch.bool), broken=(row, which, number))

    @rule(data=st.data())
    def select_rows(self, data: st.DataObject) -> None:
        source = data.draw(st.lists(st.integers(0, self.rows - 1), min_size=self.rows, max_size=self.rows))
        self.layer.select_rows(torch.tensor(source))
        self.twin.select_rows(torch.tensor(source))
        self.facts = [copy.deepcopy(self.facts[row]) for row in source]
        self.touched = [self.touched[row] for row in source]

    @invariant()
    def facts_hold(self) -> None:
        check_layer(self.case, self.layer, self.facts)
        check_key_bounds(self.twin)
        ours, twins = self.layer.resident_positions(), self.twin.resident_positions()
        for row, touched in enumerate(self.touched):
            assert touched or ours[row] == twins[row]


@pytest.mark.parametrize(
    "tries",
    [few(25, stateful_step_count=12), pytest.param(some(60, stateful_step_count=12), marks=pytest.mark.slow)],
    ids=["few", "some"],
)
def test_the_facts_hold_after_every_call(tries: settings) -> None:
    run_state_machine_as_test(CacheMachine, settings=tries)
