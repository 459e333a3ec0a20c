"""Every unit is done once, whatever workers come, go and die."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longthink.lab.evaluate.files import Item
from longthink.lab.evaluate.plan import CacheConfig, Cell, Unit
from longthink.lab.work.driver import Coordinator


def units(caches, each):
    made = []
    for i in range(caches):
        cache = CacheConfig("raas", 64 + i, None)
        cell = Cell(policy="raas", cache=cache, task="t", max_new_tokens=9, seed=0)
        made += [Unit(cell, Item(task="t", id=str(j), question="q", gold="1"), 0) for j in range(each)]
    return made


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=300),
)
def test_nothing_is_lost_or_done_twice(caches, each, events):
    asked = units(caches, each)
    coordinator = Coordinator(asked)
    at, flying, done = {}, {w: [] for w in range(4)}, []
    for worker, what in events:
        if what == 9:
            assert set(coordinator.lose(worker)) == set(flying[worker])
            flying[worker] = []
            at.pop(worker, None)
        elif what >= 6 and flying[worker]:
            unit = flying[worker].pop()
            coordinator.finish(unit)
            done.append(unit)
        elif worker not in at:
            if (cache := coordinator.assign(worker)) is not None:
                at[worker] = cache
        elif (unit := coordinator.take(worker)) is None:
            del at[worker]
        else:
            assert unit.cell.cache == at[worker]
            assert not any(unit in others for others in flying.values())
            flying[worker].append(unit)
        assert coordinator.left == len(asked) - len(done)
    for worker in flying:
        coordinator.lose(worker)
    while coordinator.assign(0) is not None:
        while (unit := coordinator.take(0)) is not None:
            coordinator.finish(unit)
            done.append(unit)
    assert sorted(done, key=asked.index) == asked
    assert coordinator.left == 0


def test_workers_go_where_fewest_others_are():
    coordinator = Coordinator(units(2, 3))
    first, second = coordinator.assign(0), coordinator.assign(1)
    assert {first.budget, second.budget} == {64, 65}
    assert coordinator.assign(2) == first
    assert coordinator.assign(1) == second


def test_what_was_in_flight_comes_first_again_and_only_that_can_finish():
    coordinator = Coordinator(asked := units(1, 3))
    coordinator.assign(0)
    assert [coordinator.take(0), coordinator.take(0)] == asked[:2]
    assert coordinator.lose(0) == asked[:2]
    with pytest.raises(KeyError):
        coordinator.finish(asked[0])
    coordinator.assign(1)
    assert [coordinator.take(1) for _ in range(4)] == [*asked, None]
