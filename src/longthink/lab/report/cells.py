"""What a store holds, sorted into cells: the samples that may be averaged, and the curves of measurements."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from longthink.lab.results.statistics import wilson
from longthink.lab.results.store import ResultStore

Row = dict[str, Any]
Problem = tuple[str, str]
"""Task and problem: the unit of all statistics."""


@dataclass(frozen=True, order=True)
class Group:
    """What is never pooled nor drawn into one figure: the model and the way of decoding."""

    model: str
    revision: str
    dtype: str
    temperature: float
    top_p: float
    top_k: int

    @property
    def label(self) -> str:
        """The group as people read it."""
        at = f"@{self.revision}" if self.revision else ""
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        how += f", top_p {self.top_p:g}" if self.top_p else ""
        how += f", top_k {self.top_k}" if self.top_k else ""
        return f"{self.model}{at}, {self.dtype}, {how}"


@dataclass(frozen=True, order=True)
class Series:
    """One policy with all its switches: what has one colour and one line."""

    policy: str
    switches: str

    @property
    def name(self) -> str:
        """The policy's name without its options."""
        return self.policy.partition(":")[0]


@dataclass(frozen=True, order=True)
class Size:
    """How much is kept: ``kind`` is budget, decode_budget, or empty where all is kept."""

    kind: str
    tokens: int

    @property
    def label(self) -> str:
        """The size as people read it."""
        return f"{self.kind.replace('_', ' ')} {self.tokens}" if self.kind else "everything kept"


@dataclass(frozen=True, order=True)
class Task:
    """A problem set and how long an answer may be; ``members`` are the tasks pooled in it, itself if none are."""

    name: str
    limits: tuple[int, ...]
    members: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """All samples of one group, task, policy and size; seeds and repeated samples are pooled.

    Every share is a mean over problems of the mean over a problem's samples, and its interval counts problems, not
    samples: several samples of one problem are not independent, and do not narrow it.
    """

    group: Group
    task: Task
    series: Series
    size: Size
    rows: tuple[Row, ...]

    @cached_property
    def by_problem(self) -> dict[Problem, list[Row]]:
        """The samples of each problem."""
        found: dict[Problem, list[Row]] = defaultdict(list)
        for row in self.rows:
            found[row["task"], row["problem"]].append(row)
        return dict(found)

    def means(self, value: str) -> dict[Problem, float]:
        """Return the mean of a number over each problem's samples."""
        return {
            problem: sum(float(row[value]) for row in rows) / len(rows)
            for problem, rows in self.by_problem.items()
        }

    def share(self, value: str) -> tuple[float, float, float]:
        """Return the share of samples for which ``value`` is true, and its Wilson 95 % interval."""
        means = self.means(value).values()
        right = min(float(len(means)), sum(means))
        return (right / len(means), *wilson(right, len(means)))

    def median(self, value: str) -> float:
        """Return the median of a number over all samples that had room."""
        values = sorted(row[value] for row in self.rows if not row["no_room"]) or [0]
        middle = len(values) // 2
        return float(values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2)


_COLUMNS = (
    "config, model, revision, dtype, policy, switches, budget, decode_budget, task, seed, temperature, top_p, top_k, "
    "max_new_tokens, problem, sample, prompt_tokens, generated_tokens, correct, finish, seconds, rows, "
    "kv_bytes_peak, dense_kv_bytes, finish = 'length' AS cut_off, finish = 'no_room' AS no_room"
)


def load_samples(store: ResultStore) -> list[Row]:
    """Return all samples without their texts, in a fixed order."""
    return store.query(f"SELECT {_COLUMNS} FROM samples ORDER BY task, problem, seed, sample, config")


def group_of(row: Row) -> Group:
    """Return the group of a sample."""
    return Group(
        row["model"],
        row["revision"] or "",
        row["dtype"],
        row["temperature"],
        row["top_p"] or 0.0,
        row["top_k"] or 0,
    )


def size_of(row: Row) -> Size:
    """Return how much was kept for a sample or a measurement."""
    for kind in ("budget", "decode_budget"):
        if row[kind] is not None:
            return Size(kind, row[kind])
    return Size("", 0)


def make_cells(samples: Iterable[Row]) -> list[Cell]:
    """Sort samples into cells, in a fixed order."""
    sorted_in: dict[tuple[Group, Task, Series, Size], list[Row]] = defaultdict(list)
    for row in samples:
        task = Task(row["task"], (row["max_new_tokens"],), (row["task"],))
        key = (group_of(row), task, Series(row["policy"], row["switches"]), size_of(row))
        sorted_in[key].append(row)
    return [Cell(*key, tuple(rows)) for key, rows in sorted(sorted_in.items(), key=lambda item: item[0])]


def pooled_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Pool the tasks of each family: those whose names differ only behind the last slash.

    A policy and size that lacks one of the family's tasks is left out, for its mean would be of other problems.
    """
    families: dict[tuple[Group, str], set[Task]] = defaultdict(set)
    for cell in cells:
        if "/" in cell.task.name:
            families[cell.group, cell.task.name.rpartition("/")[0]].add(cell.task)
    pooled = []
    for (group, name), tasks in sorted(families.items()):
        # One task with two limits is two tasks: there is no telling which of them to pool.
        if len(tasks) < 2 or len({task.name for task in tasks}) < len(tasks):
            continue
        limits = tuple(sorted({limit for task in tasks for limit in task.limits}))
        family = Task(f"{name}/*", limits, tuple(sorted(task.name for task in tasks)))
        parts: dict[tuple[Series, Size], list[Cell]] = defaultdict(list)
        for cell in cells:
            if cell.group == group and cell.task in tasks:
                parts[cell.series, cell.size].append(cell)
        for (series, size), members in sorted(parts.items(), key=lambda item: item[0]):
            if len(members) == len(tasks):
                rows = tuple(row for cell in members for row in cell.rows)
                pooled.append(Cell(group, family, series, size, rows))
    return pooled


def dense_cell(cells: Iterable[Cell], like: Cell) -> Cell | None:
    """Return the Dense cell of the same group and task, the one with most samples if there are several."""
    found = [c for c in cells if c.series.name == "dense" and (c.group, c.task) == (like.group, like.task)]
    return max(found, key=lambda cell: len(cell.rows), default=None)


def series_labels(series: Iterable[Series]) -> dict[Series, str]:
    """Return a name for each policy: its text, and a mark where equal texts stand for unequal switches."""
    found = sorted(set(series))
    texts = [one.policy for one in found]
    return {
        one: one.policy
        if texts.count(one.policy) == 1
        else f"{one.policy} (switches {hashlib.sha256(one.switches.encode()).hexdigest()[:4]})"
        for one in found
    }


def incomplete(cells: Sequence[Cell]) -> list[str]:
    """Say which cells have fewer problems than others of their group and task, so that their means are of others."""
    wanted: dict[tuple[Group, Task], set[Problem]] = defaultdict(set)
    for cell in cells:
        wanted[cell.group, cell.task] |= cell.by_problem.keys()
    return [
        f"{cell.series.policy}, {cell.size.label}, on {cell.task.name}: {len(cell.by_problem)} of "
        f"{len(wanted[cell.group, cell.task])} problems ({cell.group.label})"
        for cell in cells
        if len(cell.by_problem) < len(wanted[cell.group, cell.task])
    ]
