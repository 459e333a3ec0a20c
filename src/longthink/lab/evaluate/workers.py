"""Worker processes on one machine, each with its own model; they ask for work over a pipe."""

from __future__ import annotations

import builtins
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from longthink import errors
from longthink.errors import SweepError
from longthink.lab.evaluate.plan import Lane, Plan, Unit
from longthink.lab.evaluate.sweep import Sweep

_STOP_S = 3.0
"""Time that a worker gets to end when it is told to (seconds)."""


def run_in_processes(sweep: Sweep, count: int) -> None:
    """Make all samples in `count` processes.

    A worker that dies is not replaced: its samples in flight go to the others.

    Raises
    ------
    SweepError
        If all workers died.
    """
    pool = _Pool(sweep, count)
    try:
        pool.run()
    finally:
        pool.stop()


class _Pool:
    """The driver's side of the pipes."""

    def __init__(self, sweep: Sweep, count: int) -> None:
        self.sweep = sweep
        self.workers: dict[Connection, tuple[int, BaseProcess]] = {}
        # Workers that asked for a lane when nothing waited; a worker that dies may leave something.
        self.idle: list[Connection] = []
        context = get_context("spawn")
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_main, args=(theirs, sweep.plan, number), name=f"longthink-{number}"
            )
            process.start()
            theirs.close()
            self.workers[ours] = number, process

    def run(self) -> None:
        while not self.sweep.is_complete:
            if not self.workers:
                raise SweepError(
                    "all workers died: what is stored stays, and the same command goes on from there"
                )
            for pipe in wait(list(self.workers)):
                assert isinstance(pipe, Connection)
                try:
                    self._answer(pipe, pipe.recv())
                except (EOFError, ConnectionError):
                    self._bury(pipe)

    def _answer(self, pipe: Connection, message: tuple[Any, ...]) -> None:
        number = self.workers[pipe][0]
        match message:
            case "begin", identity:
                self.sweep.begin(identity)
            case ("lane",):
                self._give_lane(pipe)
            case "take", lane:
                pipe.send(self.sweep.take(number, lane))
            case "finished", unit, sample:
                self.sweep.finished(unit, sample)
            case "failed", kind, text:
                raise _error(kind, text)

    def _give_lane(self, pipe: Connection) -> None:
        lane = self.sweep.lane(self.workers[pipe][0])
        if lane is None:
            self.idle.append(pipe)
        else:
            pipe.send(lane)

    def _bury(self, pipe: Connection) -> None:
        number, process = self.workers.pop(pipe)
        pipe.close()
        process.join(_STOP_S)
        code = process.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.sweep.lost(number, how)
        waiting, self.idle = [other for other in self.idle if other is not pipe], []
        for other in waiting:
            self._give_lane(other)

    def stop(self) -> None:
        """End the workers: at once, for what is done is stored and what is in flight is wanted no more."""
        for _, process in self.workers.values():
            process.terminate()
        for pipe, (_, process) in self.workers.items():
            process.join(_STOP_S)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()


def _error(kind: str, text: str) -> Exception:
    """Make the error that a worker reported, of its own type where that is a known one."""
    cls = getattr(errors, kind, None) or getattr(builtins, kind, None)
    if isinstance(cls, type) and issubclass(cls, Exception) and cls is not UnicodeDecodeError:
        return cls(text)
    return SweepError(f"a worker failed: {kind}: {text}")


# The worker's side ------------------------------------------------------------------------------------------


def _main(pipe: Connection, plan: Plan, number: int) -> None:
    """Work until the driver ends this process."""
    # Ctrl-C goes to the whole group of processes: the driver decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    # Several processes with as many threads as there are cores would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        _work(pipe, plan, number)
    except ConnectionError:
        return
    except Exception as error:
        pipe.send(("failed", type(error).__name__, str(error)))


def _work(pipe: Connection, plan: Plan, number: int) -> None:
    from longthink.lab.evaluate.solver import Solver

    def units(lane: Lane) -> Iterator[Unit]:
        while True:
            pipe.send(("take", lane))
            unit: Unit | None = pipe.recv()
            if unit is None:
                return
            yield unit

    with Solver(plan, _device(plan.device, number)) as solver:
        pipe.send(("begin", solver.identity))
        while True:
            pipe.send(("lane",))
            lane: Lane = pipe.recv()
            for unit, sample in solver.solve(lane, units(lane)):
                pipe.send(("finished", unit, sample))


def _device(device: str, number: int) -> str:
    """Spread the workers over the accelerators, where the user leaves the choice."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if device == "auto" and count else device


def _end_with_the_driver() -> None:
    """End this process when the driver is gone, however it went."""
    driver = parent_process()
    assert driver is not None
    wait([driver.sentinel])
    os._exit(1)
