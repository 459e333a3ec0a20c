"""Workers on a Ray cluster: a task does a shard of units and streams the results back to the driver."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from typing_extensions import override

from longthink.errors import SweepError, needs_extra
from longthink.lab.work.driver import Driver, Identity
from longthink.lab.work.workers import Workers

LOCAL = "local"  # address that starts a cluster on this machine for the time of the work
BATCHES = 4  # maximum size of a shard, in batches
_CONNECT_S = 10.0


@contextmanager
def connected(address: str) -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with needs_extra("ray"):
        import ray
    if ray.is_initialized():
        yield ray
        return
    _check_reachable(address)
    place: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **place)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SweepError(f"no Ray cluster at {address!r}: {' '.join(str(error).split())[:300]}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse an address where nothing listens: Ray would end this process instead of raising an error."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator:
        if address not in (LOCAL, "auto"):
            raise SweepError(f"ray={address!r} must be HOST:PORT, auto or {LOCAL}")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise SweepError(f"no Ray cluster at {address!r}: {error}") from error


class RayWorkers(Workers):
    """Slots of a cluster, by default one per accelerator or CPU. Nodes need the model, not the store or the data."""

    def __init__(self, driver: Driver, ray: Any, count: int | None) -> None:
        super().__init__(driver)
        self._ray = ray
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if driver.plan.device != "cpu" else 0
        self._slots = count or max(1, gpus or int(resources.get("CPU", 1)))
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_retries": 0}
        self._task = ray.remote(num_returns="streaming", **options)(_shard)
        self._running: dict[Any, tuple[int, list[Any]]] = {}  # streams of results, with their slot and units
        self.idle = list(range(1, self._slots))
        self._submit(0, None, [])  # a shard without units reports which model it is

    @override
    def start(self, worker: int, group: Any) -> None:
        # Keep every slot busy, and let no large last shard keep the others waiting.
        fair = -(-self.driver.coordinator.left // self._slots)
        size = max(1, min(BATCHES * self.driver.plan.batch_size, fair))
        units = [unit for _ in range(size) if (unit := self.driver.take(worker)) is not None]
        self._submit(worker, group, units)

    def _submit(self, slot: int, group: Any, units: list[Any]) -> None:
        self._running[self._task.remote(self.driver.solver, self.driver.plan, group, units)] = slot, units

    @override
    def receive(self) -> None:
        exceptions = self._ray.exceptions
        (stream, *_), _ = self._ray.wait(list(self._running), num_returns=1)
        slot, units = self._running[stream]
        try:
            message = self._ray.get(next(stream))
        except StopIteration:
            del self._running[stream]
            self.idle.append(slot)
        except exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except exceptions.RayError as error:
            del self._running[stream]
            self.lose(slot, type(error).__name__)
            if self.driver.identity is None:
                self._submit(slot, None, [])
            else:
                self.idle.append(slot)
        else:
            if isinstance(message, Identity):
                self.driver.begin(message)
            else:
                number, records = message
                self.driver.finish(units[number], records)


def _shard(solver: str, plan: Any, group: Any, units: list[Any]) -> Iterator[Any]:
    own = _solver(solver, plan)
    yield own.identity
    if group is not None:
        numbers = {unit: i for i, unit in enumerate(units)}
        for unit, records in own.solve(group, units):
            yield numbers[unit], records


@cache  # keeps the model for the next shard of the same process
def _solver(module: str, plan: Any) -> Any:
    return import_module(module).Solver(plan)
