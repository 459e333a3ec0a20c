"""A sweep: what is pending according to the store is made, and every sample is stored as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from longthink.errors import SweepError
from longthink.lab.evaluate.coordinator import Coordinator
from longthink.lab.evaluate.plan import Cell, Identity, Lane, Plan, Unit
from longthink.lab.evaluate.tasks import Task
from longthink.lab.results.records import Sample
from longthink.lab.results.store import ResultStore


@dataclass
class Tally:
    """How far one configuration is: samples in all, stored ones, and right ones made in this run."""

    total: int
    stored: int = 0
    made: int = 0
    right: int = 0

    @property
    def left(self) -> int:
        """Samples still to be made."""
        return self.total - self.stored - self.made


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did: samples that were there before, samples made, and workers lost on the way."""

    stored: int
    made: int
    lost_workers: int = 0


@dataclass
class Sweep:
    """The driver's side of a sweep, whoever does the work.

    Parameters
    ----------
    plan, tasks
        What to do, and the plan's problem sets (`Plan.load_tasks`).
    store
        Where samples go to, and where those that are done come from.
    report
        Called with the sweep at the start and after every sample.
    say
        Called with a line for the user, such as that a worker was lost.
    """

    plan: Plan
    tasks: list[Task]
    store: ResultStore
    report: Callable[[Sweep], None] = lambda sweep: None
    say: Callable[[str], None] = lambda line: None
    tallies: dict[Cell, Tally] = field(default_factory=dict)
    lost_workers: int = 0
    identity: Identity | None = None

    def __post_init__(self) -> None:
        self.cells = self.plan.cells(self.tasks)
        self._coordinator: Coordinator | None = None

    @property
    def configs(self) -> list[str]:
        """Hashes of all configurations; only once the model is known."""
        assert self.identity is not None
        return [self.plan.setup(cell, self.identity).config_hash for cell, _ in self.cells]

    @property
    def coordinator(self) -> Coordinator:
        """Who does what; only once the model is known."""
        assert self._coordinator is not None
        return self._coordinator

    @property
    def is_complete(self) -> bool:
        """Whether every sample is stored."""
        return self._coordinator is not None and self._coordinator.left == 0

    @property
    def outcome(self) -> Outcome:
        """What has been done so far."""
        return Outcome(
            stored=sum(tally.stored for tally in self.tallies.values()),
            made=sum(tally.made for tally in self.tallies.values()),
            lost_workers=self.lost_workers,
        )

    def begin(self, identity: Identity) -> None:
        """Find out what is pending, now that a worker knows the model.

        Raises
        ------
        SweepError
            If two workers have loaded different models under the same name.
        """
        if self.identity is None:
            self.identity = identity
            self._coordinator = Coordinator(self._pending(identity))
            self.report(self)
        elif identity != self.identity:
            raise SweepError(
                f"workers have different models under the name {self.plan.model!r}: {self.identity} and {identity}"
            )

    def _pending(self, identity: Identity) -> Iterator[Unit]:
        # Thousands of small files would be read once for every cell.
        self.store.compact()
        for cell, task in self.cells:
            done = self.store.done(self.plan.setup(cell, identity).config_hash)
            tally = self.tallies[cell] = Tally(total=len(task.items) * self.plan.samples)
            for sample in range(self.plan.samples):
                for item in task.items:
                    if (item.id, sample) in done:
                        tally.stored += 1
                    else:
                        yield Unit(cell, item, sample)

    def lane(self, worker: int) -> Lane | None:
        """Lane for a worker that has none."""
        return self.coordinator.lane(worker)

    def take(self, worker: int, lane: Lane) -> Unit | None:
        """Next unit for a worker."""
        return self.coordinator.take(worker, lane)

    def finished(self, unit: Unit, sample: Sample) -> None:
        """Store a sample; when this returns it is on disk."""
        self.store.add(sample)
        self.coordinator.finished(unit)
        tally = self.tallies[unit.cell]
        tally.made += 1
        tally.right += sample.correct
        self.report(self)

    def lost(self, worker: int, how: str) -> list[Unit]:
        """Note that a worker is gone; what it had in flight waits for the others again, and is returned."""
        self.lost_workers += 1
        back = self._coordinator.lost(worker) if self._coordinator else []
        self.say(f"worker {worker + 1} died ({how}): its {len(back)} samples in flight go to the others")
        return back


def run_here(sweep: Sweep) -> None:
    """Make all samples in this process."""
    from longthink.lab.evaluate.solver import Solver

    with Solver(sweep.plan) as solver:
        sweep.begin(solver.identity)
        while (lane := sweep.lane(0)) is not None:
            # Ends when `take` gives None: nothing waits in this lane any more.
            units = iter(partial(sweep.take, 0, lane), None)
            for unit, sample in solver.solve(lane, units):
                sweep.finished(unit, sample)


def run_sweep(sweep: Sweep, *, workers: int | None = None, ray: str | None = None) -> Outcome:
    """Make what is pending.

    Parameters
    ----------
    workers
        Processes with a model each; 1 or None works in this process. With Ray: tasks at the same time, None for as
        many as the cluster has room for.
    ray
        Address of a Ray cluster, ``auto``, or ``local`` for one of its own; None works on this machine without it.

    Raises
    ------
    SweepError
        If all workers died; what is stored stays, and the same call goes on from there.
    """
    if ray is not None:
        from longthink.lab.evaluate.cluster import run_on_ray

        run_on_ray(sweep, ray, workers)
    elif workers is not None and workers > 1:
        from longthink.lab.evaluate.workers import run_in_processes

        run_in_processes(sweep, workers)
    else:
        run_here(sweep)
    sweep.store.compact()
    return sweep.outcome
