"""The worker's side: a solver with a model, which takes units of work and sends back records.

A solver module defines ``Solver``, a `ModelSolver`, and when run as a program calls `serve_solver`, the child of
`ProcessWorkers`.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar

import torch

from longthink.environment import hardware, versions
from longthink.lab.processes import Parent, serve
from longthink.lab.results.records import Record, to_row
from longthink.lab.work.driver import Identity
from longthink.models import load_model


class ModelSolver(AbstractContextManager[Any]):
    """The model of a plan in this process; `device` replaces the plan's. Use it in a ``with`` block.

    Subclasses name the types of their plan and units, and do the units.
    """

    plan_type: ClassVar[Any]
    unit_type: ClassVar[Any]

    def __init__(self, plan: Any, device: str | None = None) -> None:
        self.plan = plan
        place = device or plan.device
        self.loaded = load_model(plan.model, device=place, dtype=plan.dtype, revision=plan.revision)
        dtype = str(self.loaded.model.dtype).removeprefix("torch.")
        self.identity = Identity(revision=self.loaded.revision, dtype=dtype)
        self._made_with: dict[str, Any] = {
            "versions": json.dumps(versions()),
            "hardware": json.dumps(hardware()),
        }

    def __exit__(self, *exception: object) -> None:
        """Free what a subclass has opened."""

    @abstractmethod
    def solve(self, group: Any, units: Iterable[Any]) -> Iterator[tuple[Any, list[Record]]]:
        """Do units of one group; yield each with its records as soon as it is finished."""

    def made_now(self) -> dict[str, Any]:
        """Fields of a record that say with what and when it was made."""
        return self._made_with | {"created": datetime.now(UTC).isoformat(timespec="milliseconds")}


def serve_solver(solver: type[ModelSolver]) -> None:
    """Run this process as a worker."""
    serve(partial(_work, solver))


def _work(kind: type[ModelSolver], parent: Parent) -> None:
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
