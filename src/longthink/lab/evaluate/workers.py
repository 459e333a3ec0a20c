"""Running a sweep: in this process, in several on this machine, or on a Ray cluster."""

import os
import queue
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from functools import partial

from typing_extensions import override

from longthink.errors import SweepError
from longthink.lab.evaluate.plan import CacheConfig, Identity, Unit
from longthink.lab.evaluate.sweep import Sweep
from longthink.lab.processes import Child, ChildDied
from longthink.lab.results.records import Sample

ATTEMPTS = 4  # workers that may die with the same sample in flight before the sweep gives up


class Workers(ABC):
    """Hands out the work of a sweep and takes in the results. Subclasses move them to and from the workers."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.idle: list[int] = []  # numbers of the workers that wait for work
        self._deaths: Counter[Unit | None] = Counter()

    def run(self) -> None:
        while not self.sweep.is_complete:
            waiting, self.idle = self.idle, []
            for worker in waiting:
                cache = self.sweep.assign(worker)
                if cache is None:  # a worker that dies may leave something
                    self.idle.append(worker)
                else:
                    self.start(worker, cache)
            self.receive()

    @abstractmethod
    def start(self, worker: int, cache: CacheConfig) -> None:
        """Let an idle worker make samples with a cache."""

    @abstractmethod
    def receive(self) -> None:
        """Wait for a message of any worker and handle it."""

    def lose(self, worker: int, reason: str) -> None:
        """Handle the death of a worker; give up if a sample, or loading the model, keeps killing workers."""
        units: list[Unit | None] = [*self.sweep.lose(worker, reason)]
        for unit in units or [None]:
            self._deaths[unit] += 1
            if self._deaths[unit] >= ATTEMPTS:
                what = "loading the model" if unit is None else f"sample {unit.key!r}"
                raise SweepError(f"{ATTEMPTS} workers died ({reason}) at {what}; what is stored stays")


class ProcessWorkers(Workers):
    """Processes on this machine with a model each; a dead one is not replaced. Close them after use."""

    def __init__(self, sweep: Sweep, count: int) -> None:
        super().__init__(sweep)
        self._inbox: queue.SimpleQueue[tuple[Child, bytes]] = queue.SimpleQueue()
        self._workers: dict[Child, int] = {}
        # Several processes with a thread per core each would only wait for each other.
        env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        for number in range(count):
            child = Child("longthink.lab.evaluate.solver", env=env, inbox=self._inbox)
            self._workers[child] = number
            child.send([asdict(sweep.plan), number])
        self._taken: list[Unit] = []  # by the numbers that workers use for them

    @override
    def start(self, worker: int, cache: CacheConfig) -> None:
        next(child for child, number in self._workers.items() if number == worker).send(cache)

    @override
    def receive(self) -> None:
        if not self._workers:
            raise SweepError(
                "all workers died: what is stored stays, and the same command goes on from there"
            )
        child, line = self._inbox.get()
        worker = self._workers[child]
        try:
            message = child.parse(line)
        except ChildDied as death:
            del self._workers[child]
            child.close()
            self.idle = [other for other in self.idle if other != worker]
            self.lose(worker, str(death))
            return
        match message:
            case ["begin", *identity]:
                self.sweep.begin(Identity(*identity))
            case ["idle"]:
                self.idle.append(worker)
            case ["take"]:
                unit = self.sweep.take(worker)
                child.send(None if unit is None else [len(self._taken), unit.to_json()])
                self._taken += [] if unit is None else [unit]
            case ["finish", number, row]:
                self.sweep.finish(self._taken[number], Sample(**row))

    def close(self) -> None:
        """End the workers at once: finished samples are stored, and those in flight are not wanted any more."""
        for child in self._workers:
            child.close()


def run_sweep(sweep: Sweep, *, workers: int | None = None, ray: str | None = None) -> None:
    """Make every sample that is missing, with a model in each of `workers` processes or on a Ray cluster.

    `ray` is an address, ``auto``, or ``local`` for a cluster that ends with the sweep; `workers` then limits its
    tasks at a time. `SweepError` if all workers die; the same call goes on from what is stored.
    """
    if ray is not None:
        # Imports transformers, like `_run_here`.
        from longthink.lab.evaluate.cluster import RayWorkers, connected

        with connected(ray) as module:
            RayWorkers(sweep, module, workers).run()
    elif workers is not None and workers > 1:
        with closing(ProcessWorkers(sweep, workers)) as processes:
            processes.run()
    else:
        _run_here(sweep)
    sweep.store.compact()


def _run_here(sweep: Sweep) -> None:
    # Transformers takes seconds to import, and only the process that has the model needs it.
    from longthink.lab.evaluate.solver import Solver

    with Solver(sweep.plan) as solver:
        sweep.begin(solver.identity)
        while (cache := sweep.assign(0)) is not None:
            for unit, sample in solver.solve(cache, iter(partial(sweep.take, 0), None)):
                sweep.finish(unit, sample)
