"""The same sweep on a Ray cluster: shards of samples as tasks, whose rows come back to the driver one by one."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

from longthink.errors import SweepError, needs_extra
from longthink.lab.evaluate.plan import Identity, Lane, Plan, Unit
from longthink.lab.evaluate.solver import Solver
from longthink.lab.evaluate.sweep import Sweep
from longthink.lab.results.records import Sample

LOCAL = "local"
"""Address that starts a cluster on this machine, and ends it with the sweep."""
BATCHES = 4
"""A shard has at most this many times the samples that are decoded side by side."""
ATTEMPTS = 4
"""Workers that may die with a sample in flight before the sweep gives up."""
_CONNECT_S = 10.0
"""Time to reach the address of a cluster (seconds)."""


def run_on_ray(sweep: Sweep, address: str, parallel: int | None = None) -> None:
    """Make all samples as Ray tasks.

    Nodes need longthink and the model, but neither the store nor the problem files. A worker that dies costs the
    samples it had in flight, which go to others.

    Parameters
    ----------
    address
        Address of a cluster, ``auto``, or ``local``. Where this process is connected already, that cluster is used.
    parallel
        Tasks at the same time; None for as many as the cluster has accelerators, or CPUs if it has none.

    Raises
    ------
    MissingExtraError
        If Ray is not installed.
    SweepError
        If the cluster cannot be reached, or a sample takes one worker after the other down.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with needs_extra("ray"):
        import ray
    own = not ray.is_initialized()
    if own:
        _check_reachable(address)
        place: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {"address": address}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **place)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SweepError(
                f"no Ray cluster at {address!r}: {' '.join(str(error).split())[:300]}"
            ) from error
    try:
        _Driver(sweep, ray, parallel).run()
    finally:
        if own:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse an address where nobody listens: Ray would end this process instead of raising an error."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator:
        if address not in (LOCAL, "auto"):
            raise SweepError(f"ray={address!r} must be HOST:PORT, auto or {LOCAL}")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise SweepError(f"no Ray cluster at {address!r}: {error}") from error


class _Driver:
    """Gives out shards and takes in their rows."""

    def __init__(self, sweep: Sweep, ray: Any, parallel: int | None) -> None:
        self.sweep = sweep
        self.ray = ray
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if sweep.plan.device != "cpu" else 0
        self.slots = parallel or max(1, gpus or int(resources.get("CPU", 1)))
        self.task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=0, num_returns="streaming")(
            _shard
        )
        self.free = list(range(self.slots))
        # What a task yields, its slot and its units.
        self.running: dict[Any, tuple[int, list[Unit]]] = {}
        self.deaths: Counter[Unit | None] = Counter()

    def run(self) -> None:
        # A task without units says which model it is; what is pending depends on that.
        while self.sweep.identity is None:
            if not self.running:
                self.running[self.task.remote(self.sweep.plan, None, [])] = self.free.pop(), []
            self._receive_next()
        while not self.sweep.is_complete:
            self._fill()
            self._receive_next()

    def _fill(self) -> None:
        """Start a shard in every free slot, as long as anything waits."""
        while self.free:
            slot = self.free[-1]
            lane = self.sweep.lane(slot)
            if lane is None:
                return
            units = self._units(slot, lane)
            self.running[self.task.remote(self.sweep.plan, lane, units)] = self.free.pop(), units

    def _units(self, slot: int, lane: Lane) -> list[Unit]:
        # All slots shall have something to do, and the last shards not keep the others waiting for long.
        fair = -(-self.sweep.coordinator.left // self.slots)
        size = max(1, min(BATCHES * self.sweep.plan.rows_or_default, fair))
        units = (self.sweep.take(slot, lane) for _ in range(size))
        return [unit for unit in units if unit is not None]

    def _receive_next(self) -> None:
        exceptions = self.ray.exceptions
        (stream, *_), _ = self.ray.wait(list(self.running), num_returns=1)
        slot, units = self.running[stream]
        try:
            message = self.ray.get(next(stream))
        except StopIteration:
            del self.running[stream]
            self.free.append(slot)
        except exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except exceptions.RayError as error:
            del self.running[stream]
            self.free.append(slot)
            self._bury(slot, type(error).__name__)
        else:
            self._accept(message, units)

    def _accept(self, message: Identity | tuple[int, Sample], units: list[Unit]) -> None:
        if isinstance(message, Identity):
            self.sweep.begin(message)
        else:
            number, sample = message
            self.sweep.finished(units[number], sample)

    def _bury(self, slot: int, how: str) -> None:
        lost: list[Unit | None] = [*self.sweep.lost(slot, how)]
        for unit in lost or [None]:
            self.deaths[unit] += 1
            if self.deaths[unit] >= ATTEMPTS:
                what = "loading the model" if unit is None else f"sample {unit.key!r}"
                raise SweepError(f"{ATTEMPTS} workers died ({how}) at {what}; what is stored stays")


def _shard(plan: Plan, lane: Lane | None, units: list[Unit]) -> Iterator[Identity | tuple[int, Sample]]:
    """Ray task: yield the model's identity, then number and row of each unit as soon as it is complete."""
    solver = _solver(plan)
    yield solver.identity
    if lane is not None:
        numbers = {unit: i for i, unit in enumerate(units)}
        for unit, sample in solver.solve(lane, units):
            yield numbers[unit], sample


@cache
def _solver(plan: Plan) -> Solver:
    """Keep the model of a Ray process, which serves one shard after the other."""
    return Solver(plan)
