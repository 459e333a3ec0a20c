"""Every unit is done once, whatever workers come, go and die."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longthink.lab.evaluate.coordinator import Coordinator
from longthink.lab.evaluate.plan import Cell, Lane, Unit
from longthink.lab.evaluate.tasks import Item


def units(lanes, each):
    made = []
    for i in range(lanes):
        cell = Cell(
            policy="raas",
            lane=Lane("raas", 64 + i, None),
            task="t",
            grading="exact",
            max_new_tokens=9,
            seed=0,
        )
        made += [Unit(cell, Item(task="t", id=str(j), question="q", gold="1"), 0) for j in range(each)]
    return made


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=300),
)
def test_nothing_is_lost_or_done_twice(lanes, each, events):
    asked = units(lanes, each)
    coordinator = Coordinator(asked)
    at, flying, done = {}, {w: [] for w in range(4)}, []
    for worker, what in events:
        if what == 9:
            assert set(coordinator.lost(worker)) == set(flying[worker])
            flying[worker] = []
            at.pop(worker, None)
        elif what >= 6 and flying[worker]:
            unit = flying[worker].pop()
            coordinator.finished(unit)
            done.append(unit)
        elif worker not in at:
            if (lane := coordinator.lane(worker)) is not None:
                at[worker] = lane
        elif (unit := coordinator.take(worker, at[worker])) is None:
            del at[worker]
        else:
            assert unit.cell.lane == at[worker]
            assert not any(unit in others for others in flying.values())
            flying[worker].append(unit)
        assert coordinator.left == len(asked) - len(done)
    for worker in flying:
        coordinator.lost(worker)
    while (lane := coordinator.lane(0)) is not None:
        while (unit := coordinator.take(0, lane)) is not None:
            coordinator.finished(unit)
            done.append(unit)
    assert sorted(done, key=asked.index) == asked
    assert coordinator.left == 0 and not coordinator.waiting


def test_workers_go_where_fewest_others_are():
    coordinator = Coordinator(units(2, 3))
    first, second = coordinator.lane(0), coordinator.lane(1)
    assert {first.budget, second.budget} == {64, 65}
    assert coordinator.lane(2) == first
    assert coordinator.lane(1) == second


def test_what_was_in_flight_comes_first_again_and_only_that_can_finish():
    coordinator = Coordinator(asked := units(1, 3))
    lane = coordinator.lane(0)
    assert [coordinator.take(0, lane), coordinator.take(0, lane)] == asked[:2]
    assert coordinator.lost(0) == asked[:2]
    with pytest.raises(KeyError):
        coordinator.finished(asked[0])
    assert [coordinator.take(1, lane) for _ in range(4)] == [*asked, None]
