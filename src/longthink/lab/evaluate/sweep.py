"""A sweep: make what is missing in the store, and store every sample as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from typing_extensions import override

from longthink.lab.evaluate.plan import Plan, Unit
from longthink.lab.evaluate.tasks import Task
from longthink.lab.results.records import Record, Sample
from longthink.lab.results.store import ResultStore
from longthink.lab.work.driver import Driver, Identity, Tally


class Sweep(Driver):
    """The driver of an evaluation: a unit is one answer to one problem."""

    solver = "longthink.lab.evaluate.solver"
    noun = "samples"

    def __init__(
        self,
        plan: Plan,
        tasks: list[Task],
        store: ResultStore,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(plan, store, say)
        self.tasks = tasks
        self.cells = plan.cells(tasks)

    @property
    def configs(self) -> list[str]:
        assert self.identity is not None
        return [self.plan.setup(cell, self.identity).config_hash for cell, _ in self.cells]

    @override
    def missing(self, identity: Identity) -> Iterator[Unit]:
        for cell, task in self.cells:
            done = self.store.done(Sample, self.plan.setup(cell, identity).config_hash)
            tally = self.tallies[cell] = Tally(total=len(task.items) * self.plan.samples)
            for sample in range(self.plan.samples):
                for item in task.items:
                    if (item.id, sample) in done:
                        tally.stored += 1
                    else:
                        yield Unit(cell, item, sample)

    @override
    def count(self, unit: Unit, records: list[Record]) -> None:
        tally = self.tallies[unit.cell]
        for record in records:
            assert isinstance(record, Sample)
            tally.made += 1
            tally.right += record.correct
