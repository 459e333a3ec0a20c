"""Who does what: the samples still to be made, those in flight and those that are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from longthink.lab.evaluate.plan import Lane, Unit


class Coordinator:
    """Hands each unit to one worker; what a lost worker had in flight goes to the others.

    Parameters
    ----------
    units
        The samples to make, each once.
    """

    def __init__(self, units: Iterable[Unit]) -> None:
        self._pending: dict[Lane, deque[Unit]] = {}
        for unit in units:
            self._pending.setdefault(unit.cell.lane, deque()).append(unit)
        self._in_flight: dict[Unit, int] = {}
        self._at: dict[int, Lane] = {}

    @property
    def left(self) -> int:
        """Units that are not done."""
        return len(self._in_flight) + sum(map(len, self._pending.values()))

    @property
    def waiting(self) -> bool:
        """Whether a unit waits for a worker."""
        return any(self._pending.values())

    def lane(self, worker: int) -> Lane | None:
        """Give a worker the lane that fewest others are at, or None if nothing waits."""
        self._at.pop(worker, None)
        crowd = list(self._at.values())
        lane = min((lane for lane, units in self._pending.items() if units), key=crowd.count, default=None)
        if lane is not None:
            self._at[worker] = lane
        return lane

    def take(self, worker: int, lane: Lane) -> Unit | None:
        """Give a worker the next unit of its lane, or None if none waits there."""
        if not self._pending.get(lane):
            return None
        unit = self._pending[lane].popleft()
        self._in_flight[unit] = worker
        return unit

    def finished(self, unit: Unit) -> None:
        """Note that a unit is done.

        Raises
        ------
        KeyError
            If it was not in flight.
        """
        del self._in_flight[unit]

    def lost(self, worker: int) -> list[Unit]:
        """Put what a worker had in flight back, first in line; return it."""
        self._at.pop(worker, None)
        units = [unit for unit, at in self._in_flight.items() if at == worker]
        for unit in reversed(units):
            del self._in_flight[unit]
            self._pending[unit.cell.lane].appendleft(unit)
        return units
