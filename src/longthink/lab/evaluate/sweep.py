"""A sweep: make what is missing in the store, and store every sample as soon as it is complete."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, field
from functools import cached_property

from longthink.errors import SweepError
from longthink.lab.evaluate.plan import CacheConfig, Cell, Identity, Plan, Unit
from longthink.lab.evaluate.tasks import Task
from longthink.lab.results.records import Sample
from longthink.lab.results.store import ResultStore


class Coordinator:
    """Hands each unit to one worker; units that a lost worker had in flight go to others."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self._pending: dict[CacheConfig, deque[Unit]] = {}
        for unit in units:
            self._pending.setdefault(unit.cell.cache, deque()).append(unit)
        self._in_flight: dict[Unit, int] = {}
        self._assigned: dict[int, CacheConfig] = {}

    @property
    def left(self) -> int:
        return len(self._in_flight) + sum(map(len, self._pending.values()))

    def assign(self, worker: int) -> CacheConfig | None:
        """Assign a worker to a cache with pending units, the one with the fewest workers; None if there is none."""
        self._assigned.pop(worker, None)
        taken = list(self._assigned.values())
        cache = min((cache for cache, units in self._pending.items() if units), key=taken.count, default=None)
        if cache is not None:
            self._assigned[worker] = cache
        return cache

    def take(self, worker: int) -> Unit | None:
        pending = self._pending[self._assigned[worker]]
        if not pending:
            return None
        unit = pending.popleft()
        self._in_flight[unit] = worker
        return unit

    def finish(self, unit: Unit) -> None:
        del self._in_flight[unit]

    def lose(self, worker: int) -> list[Unit]:
        """Put the units that a worker had in flight back to the front of the queue; return them."""
        self._assigned.pop(worker, None)
        units = [unit for unit, holder in self._in_flight.items() if holder == worker]
        for unit in reversed(units):
            del self._in_flight[unit]
            self._pending[unit.cell.cache].appendleft(unit)
        return units


@dataclass
class Tally:
    """Samples of one configuration: in total, already stored, and made and right in this run."""

    total: int = 0
    stored: int = 0
    made: int = 0
    right: int = 0

    @property
    def left(self) -> int:
        return self.total - self.stored - self.made

    def __add__(self, other: Tally) -> Tally:
        return Tally(*map(operator.add, astuple(self), astuple(other)))


@dataclass
class Sweep:
    """The driver of a sweep: hands out work and stores what comes back, wherever the workers run."""

    plan: Plan
    tasks: list[Task]
    store: ResultStore
    report: Callable[[Sweep], None] = lambda sweep: None  # at the start and after every sample
    say: Callable[[str], None] = lambda line: None  # lines for the user, such as that a worker died
    tallies: dict[Cell, Tally] = field(default_factory=dict)
    lost_workers: int = 0
    identity: Identity | None = None

    def __post_init__(self) -> None:
        self.cells = self.plan.cells(self.tasks)

    @property
    def configs(self) -> list[str]:
        assert self.identity is not None
        return [self.plan.setup(cell, self.identity).config_hash for cell, _ in self.cells]

    @property
    def is_complete(self) -> bool:
        return self.identity is not None and self.coordinator.left == 0

    @property
    def total(self) -> Tally:
        return sum(self.tallies.values(), Tally())

    def begin(self, identity: Identity) -> None:
        """Find out what is missing, now that a worker has loaded the model; all workers must have the same."""
        if self.identity is None:
            self.identity = identity
            _ = self.coordinator
            self.report(self)
        elif identity != self.identity:
            raise SweepError(
                f"workers have different models under the name {self.plan.model!r}: {self.identity} and {identity}"
            )

    @cached_property
    def coordinator(self) -> Coordinator:
        assert self.identity is not None
        return Coordinator(self._missing(self.identity))

    def _missing(self, identity: Identity) -> Iterator[Unit]:
        self.store.compact()  # otherwise thousands of small files would be read once per cell
        for cell, task in self.cells:
            done = self.store.done(self.plan.setup(cell, identity).config_hash)
            tally = self.tallies[cell] = Tally(total=len(task.items) * self.plan.samples)
            for sample in range(self.plan.samples):
                for item in task.items:
                    if (item.id, sample) in done:
                        tally.stored += 1
                    else:
                        yield Unit(cell, item, sample)

    def assign(self, worker: int) -> CacheConfig | None:
        return None if self.identity is None else self.coordinator.assign(worker)

    def take(self, worker: int) -> Unit | None:
        return self.coordinator.take(worker)

    def finish(self, unit: Unit, sample: Sample) -> None:
        self.store.add(sample)
        self.coordinator.finish(unit)
        tally = self.tallies[unit.cell]
        tally.made += 1
        tally.right += sample.correct
        self.report(self)

    def lose(self, worker: int, reason: str) -> list[Unit]:
        self.lost_workers += 1
        units = self.coordinator.lose(worker) if self.identity else []
        fate = f"{len(units)} samples in flight are done again by others"
        self.say(f"worker {worker + 1} died ({reason}): {fate}")
        return units
