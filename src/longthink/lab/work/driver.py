"""The driver of work that a model does in pieces: hands out what is missing, stores each result as it comes.

A unit of work yields records for the result store. Units of the same group can be done in one go by a worker, such as
samples that are decoded in one batch.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

from longthink.errors import SweepError
from longthink.lab.results.records import Record
from longthink.lab.results.store import ResultStore


class Identity(NamedTuple):
    """What belongs to a setup and is known only once the model has been loaded."""

    revision: str | None
    dtype: str


class Unit(Protocol):
    """A piece of work. Equal units are the same work."""

    @property
    def group(self) -> Any:
        """What the units of one go have in common, a tuple of JSON values."""
        ...

    @property
    def key(self) -> str:
        """Its name in messages."""
        ...

    def to_json(self) -> list[Any]: ...


class Plan(Protocol):
    """What is to be done, a dataclass of JSON values."""

    model: str
    device: str

    @property
    def batch_size(self) -> int: ...


class Coordinator:
    """Hands each unit to one worker; units that a lost worker had in flight go to others."""

    def __init__(self, units: Iterable[Any]) -> None:
        self._pending: dict[Any, deque[Any]] = {}
        for unit in units:
            self._pending.setdefault(unit.group, deque()).append(unit)
        self._in_flight: dict[Any, int] = {}
        self._assigned: dict[int, Any] = {}

    @property
    def left(self) -> int:
        return len(self._in_flight) + sum(map(len, self._pending.values()))

    def assign(self, worker: int) -> Any:
        """Assign a worker to a group with pending units, the one with the fewest workers; None if there is none."""
        self._assigned.pop(worker, None)
        taken = list(self._assigned.values())
        group = min((group for group, units in self._pending.items() if units), key=taken.count, default=None)
        if group is not None:
            self._assigned[worker] = group
        return group

    def take(self, worker: int) -> Any:
        pending = self._pending[self._assigned[worker]]
        if not pending:
            return None
        unit = pending.popleft()
        self._in_flight[unit] = worker
        return unit

    def finish(self, unit: Any) -> None:
        del self._in_flight[unit]

    def lose(self, worker: int) -> list[Any]:
        """Put the units that a worker had in flight back to the front of the queue; return them."""
        self._assigned.pop(worker, None)
        units = [unit for unit, holder in self._in_flight.items() if holder == worker]
        for unit in reversed(units):
            del self._in_flight[unit]
            self._pending[unit.group].appendleft(unit)
        return units


@dataclass
class Tally:
    """Results of one configuration: in total, already stored, and made and right in this run."""

    total: int = 0
    stored: int = 0
    made: int = 0
    right: int = 0

    @property
    def left(self) -> int:
        return self.total - self.stored - self.made

    def __add__(self, other: Tally) -> Tally:
        return Tally(*map(operator.add, astuple(self), astuple(other)))


class Driver(ABC):
    """Hands out work and stores what comes back, wherever the workers run.

    Attributes
    ----------
    solver
        Module of the worker's side, with the class ``Solver``: see `longthink.lab.work.child`.
    noun
        What a result is called in messages, in the plural.
    """

    solver: ClassVar[str]
    noun: ClassVar[str]

    def __init__(self, plan: Any, store: ResultStore, say: Callable[[str], None] = lambda line: None) -> None:
        self.plan = plan
        self.store = store
        self.say = say  # lines for the user, such as that a worker died
        self.report: Callable[[Any], None] = lambda driver: None  # at the start and after every result
        self.lost_workers = 0
        self.identity: Identity | None = None
        self.tallies: dict[Any, Tally] = {}

    @abstractmethod
    def missing(self, identity: Identity) -> Iterator[Any]:
        """Units whose results are not in the store; fills `tallies`."""

    @abstractmethod
    def count(self, unit: Any, records: list[Record]) -> None:
        """Count the results of a unit in `tallies`."""

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
        self.store.compact()  # otherwise thousands of small files would be read once per configuration
        return Coordinator(self.missing(self.identity))

    def assign(self, worker: int) -> Any:
        return None if self.identity is None else self.coordinator.assign(worker)

    def take(self, worker: int) -> Any:
        return self.coordinator.take(worker)

    def finish(self, unit: Any, records: list[Record]) -> None:
        self.store.add(*records)
        self.coordinator.finish(unit)
        self.count(unit, records)
        self.report(self)

    def lose(self, worker: int, reason: str) -> list[Any]:
        self.lost_workers += 1
        units = self.coordinator.lose(worker) if self.identity else []
        fate = f"{len(units)} {self.noun} in flight are done again by others"
        self.say(f"worker {worker + 1} died ({reason}): {fate}")
        return units
