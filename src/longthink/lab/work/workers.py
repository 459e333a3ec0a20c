"""Doing the work of a driver: in this process, in several on this machine, or on a Ray cluster."""

import os
import queue
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from functools import partial
from importlib import import_module
from typing import Any

from typing_extensions import override

from longthink.errors import SweepError
from longthink.lab.processes import Child, ChildDied
from longthink.lab.results.schema import TABLES
from longthink.lab.work.driver import Driver, Identity

ATTEMPTS = 4  # workers that may die with the same unit in flight before the driver gives up


class Workers(ABC):
    """Hands out the work of a driver and takes in the results. Subclasses move them to and from the workers."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.idle: list[int] = []  # numbers of the workers that wait for work
        self._deaths: Counter[Any] = Counter()

    def run(self) -> None:
        while not self.driver.is_complete:
            waiting, self.idle = self.idle, []
            for worker in waiting:
                group = self.driver.assign(worker)
                if group is None:  # a worker that dies may leave something
                    self.idle.append(worker)
                else:
                    self.start(worker, group)
            self.receive()

    @abstractmethod
    def start(self, worker: int, group: Any) -> None:
        """Let an idle worker do units of a group."""

    @abstractmethod
    def receive(self) -> None:
        """Wait for a message of any worker and handle it."""

    def lose(self, worker: int, reason: str) -> None:
        """Handle the death of a worker; give up if a unit, or loading the model, keeps killing workers."""
        units: list[Any] = [*self.driver.lose(worker, reason)]
        for unit in units or [None]:
            self._deaths[unit] += 1
            if self._deaths[unit] >= ATTEMPTS:
                what = "loading the model" if unit is None else f"{unit.key!r}"
                raise SweepError(f"{ATTEMPTS} workers died ({reason}) at {what}; what is stored stays")


class ProcessWorkers(Workers):
    """Processes on this machine with a model each; a dead one is not replaced. Close them after use."""

    def __init__(self, driver: Driver, count: int) -> None:
        super().__init__(driver)
        self._inbox: queue.SimpleQueue[tuple[Child, bytes]] = queue.SimpleQueue()
        self._workers: dict[Child, int] = {}
        # Several processes with a thread per core each would only wait for each other.
        env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        for number in range(count):
            child = Child(driver.solver, env=env, inbox=self._inbox)
            self._workers[child] = number
            child.send([asdict(driver.plan), number])
        self._taken: list[Any] = []  # by the numbers that workers use for them

    @override
    def start(self, worker: int, group: Any) -> None:
        next(child for child, number in self._workers.items() if number == worker).send(group)

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
                self.driver.begin(Identity(*identity))
            case ["idle"]:
                self.idle.append(worker)
            case ["take"]:
                unit = self.driver.take(worker)
                child.send(None if unit is None else [len(self._taken), unit.to_json()])
                self._taken += [] if unit is None else [unit]
            case ["finish", number, rows]:
                self.driver.finish(self._taken[number], [TABLES[table](**row) for table, row in rows])

    def close(self) -> None:
        """End the workers at once: finished units are stored, and those in flight are not wanted any more."""
        for child in self._workers:
            child.close()


def run_work(driver: Driver, *, workers: int | None = None, ray: str | None = None) -> None:
    """Do everything that is missing, with a model in each of `workers` processes or on a Ray cluster.

    `ray` is an address, ``auto``, or ``local`` for a cluster that ends with the work; `workers` then limits its
    tasks at a time. `SweepError` if all workers die; the same call goes on from what is stored.
    """
    if ray is not None:
        # Imports transformers, like `_run_here`.
        from longthink.lab.work.cluster import RayWorkers, connected

        with connected(ray) as module:
            RayWorkers(driver, module, workers).run()
    elif workers is not None and workers > 1:
        with closing(ProcessWorkers(driver, workers)) as processes:
            processes.run()
    else:
        _run_here(driver)
    driver.store.compact()


def _run_here(driver: Driver) -> None:
    # Transformers takes seconds to import, and only the process that has the model needs it.
    with import_module(driver.solver).Solver(driver.plan) as solver:
        driver.begin(solver.identity)
        while (group := driver.assign(0)) is not None:
            for unit, records in solver.solve(group, iter(partial(driver.take, 0), None)):
                driver.finish(unit, records)
