"""The worker's side: a solver with a model, which takes units of work and sends back records.

A solver module defines ``Solver``, and when run as a program calls `serve_solver`, the child of `ProcessWorkers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch

from longthink.lab.processes import Parent, serve
from longthink.lab.results.records import Record, to_row
from longthink.lab.work.driver import Identity


class Solver(AbstractContextManager[Any], Protocol):
    """A loaded model that does units of work; `device` replaces the plan's."""

    plan_type: Any
    unit_type: Any
    identity: Identity

    def __init__(self, plan: Any, device: str | None = None) -> None: ...

    def solve(self, group: Any, units: Iterable[Any]) -> Iterator[tuple[Any, list[Record]]]:
        """Do units of one group; yield each with its records as soon as it is finished."""
        ...


def serve_solver(solver: type[Solver]) -> None:
    """Run this process as a worker."""
    serve(partial(_work, solver))


def _work(kind: type[Solver], parent: Parent) -> None:
    values, number = parent.receive()
    plan, count = kind.plan_type.from_json(values), torch.cuda.device_count()
    device = f"cuda:{number % count}" if plan.device == "auto" and count else plan.device
    numbers: dict[Any, int] = {}

    def units() -> Iterator[Any]:
        while True:
            parent.send(["take"])
            if (taken := parent.receive()) is None:
                return
            unit = kind.unit_type.from_json(taken[1])
            numbers[unit] = taken[0]
            yield unit

    with kind(plan, device) as solver:
        parent.send(["begin", *solver.identity])
        while True:
            parent.send(["idle"])
            for unit, records in solver.solve(parent.receive(), units()):
                rows = [[record.table, to_row(record)] for record in records]
                parent.send(["finish", numbers.pop(unit), rows])
