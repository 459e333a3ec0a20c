"""What a store holds, sorted into cells: the samples that may be averaged, and the curves of measurements."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from statistics import median
from typing import Any

from longthink.lab.results.statistics import wilson
from longthink.lab.results.store import ResultStore

Row = dict[str, Any]
Problem = tuple[str, str]  # task and problem: the unit of all statistics


@dataclass(frozen=True, order=True)
class Group:
    """A model and its decoding parameters: what is never pooled, nor drawn into one figure."""

    model: str
    revision: str
    dtype: str
    temperature: float
    top_p: float
    top_k: int

    @property
    def label(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        decoding = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        decoding += f", top_p {self.top_p:g}" if self.top_p else ""
        decoding += f", top_k {self.top_k}" if self.top_k else ""
        return f"{self.model}{at}, {self.dtype}, {decoding}"


@dataclass(frozen=True, order=True)
class Series:
    """One policy with all its switches, drawn as one line."""

    policy: str
    switches: str

    @property
    def name(self) -> str:
        return self.policy.partition(":")[0]


@dataclass(frozen=True, order=True)
class Size:
    """How much is kept: ``kind`` is budget, decode_budget, or empty where all is kept."""

    kind: str
    tokens: int

    @property
    def label(self) -> str:
        return f"{self.kind.replace('_', ' ')} {self.tokens}" if self.kind else "everything kept"


@dataclass(frozen=True, order=True)
class Task:
    """A problem set and its token limits; ``members`` are the tasks pooled in it, itself if none are."""

    name: str
    limits: tuple[int, ...]
    members: tuple[str, ...]


Key = tuple[Group, Task, Series, Size]  # what makes two cells comparable


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

    @property
    def label(self) -> str:
        limits = "/".join(map(str, self.task.limits))
        setup = f"{self.series.policy}, {self.size.label}, {self.task.name}, at most {limits} tokens"
        return f"{setup} ({self.group.label})"

    @property
    def key(self) -> Key:
        return self.group, self.task, self.series, self.size

    @cached_property
    def by_problem(self) -> dict[Problem, list[Row]]:
        found: dict[Problem, list[Row]] = defaultdict(list)
        for row in self.rows:
            found[row["task"], row["problem"]].append(row)
        return dict(found)

    def means(self, value: str) -> dict[Problem, float]:
        return {
            problem: sum(float(row[value]) for row in rows) / len(rows)
            for problem, rows in self.by_problem.items()
        }

    def share(self, value: str) -> tuple[float, float, float]:
        """Share of samples for which ``value`` is true, and its Wilson 95 % interval."""
        means = self.means(value).values()
        right = min(float(len(means)), sum(means))
        return (right / len(means), *wilson(right, len(means)))

    def median(self, value: str) -> float:
        """Median of a number over all samples that had room."""
        return float(median([row[value] for row in self.rows if not row["no_room"]] or [0]))


POLICY = "policy || coalesce(' (' || nullif(concat_ws(' ', kv_dtype, kv_bits || ' bits'), '') || ')', '') AS policy"
_COLUMNS = (
    f"config, model, revision, dtype, {POLICY}, switches, budget, decode_budget, task, seed, temperature, "
    "top_p, top_k, max_new_tokens, problem, sample, prompt_tokens, generated_tokens, correct, finish, seconds, rows, "
    "kv_bytes_peak, dense_kv_bytes, finish = 'length' AS cut_off, finish = 'no_room' AS no_room"
)


def load_samples(store: ResultStore) -> list[Row]:
    return store.query(f"SELECT {_COLUMNS} FROM samples ORDER BY task, problem, seed, sample, config")


def _group_of(row: Row) -> Group:
    decoding = (row["temperature"], row["top_p"] or 0.0, row["top_k"] or 0)
    return Group(row["model"], row["revision"] or "", row["dtype"], *decoding)


def size_of(row: Row) -> Size:
    for kind in ("budget", "decode_budget"):
        if row[kind] is not None:
            return Size(kind, row[kind])
    return Size("", 0)


def make_cells(samples: Iterable[Row]) -> list[Cell]:
    sorted_in: dict[Key, list[Row]] = defaultdict(list)
    for row in samples:
        task = Task(row["task"], (row["max_new_tokens"],), (row["task"],))
        key = (_group_of(row), task, Series(row["policy"], row["switches"]), size_of(row))
        sorted_in[key].append(row)
    return [Cell(*key, tuple(rows)) for key, rows in sorted(sorted_in.items(), key=lambda item: item[0])]


def pooled_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Pool the tasks of each family: those whose names differ only after the last slash.

    A policy and size that lacks one of the family's tasks is left out: its mean would be over other problems.
    """
    families: dict[tuple[Group, str], set[Task]] = defaultdict(set)
    for cell in cells:
        if "/" in cell.task.name:
            families[cell.group, cell.task.name.rpartition("/")[0]].add(cell.task)
    pooled = []
    for (group, name), tasks in sorted(families.items()):
        # One task with two limits is two tasks, and it is unclear which of them to pool.
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
    """Return the Dense cell of the same group and task, the one with the most samples if there are several."""
    found = [c for c in cells if c.series.name == "dense" and (c.group, c.task) == (like.group, like.task)]
    return max(found, key=lambda cell: len(cell.rows), default=None)


def series_labels(series: Iterable[Series]) -> dict[Series, str]:
    """Return a label for each policy: its specification, and a hash where equal ones have different switches."""
    found = sorted(set(series))
    texts = [one.policy for one in found]
    return {
        one: one.policy
        if texts.count(one.policy) == 1
        else f"{one.policy} (switches {hashlib.sha256(one.switches.encode()).hexdigest()[:4]})"
        for one in found
    }


def incomplete(cells: Sequence[Cell]) -> list[str]:
    wanted: dict[tuple[Group, Task], set[Problem]] = defaultdict(set)
    for cell in cells:
        wanted[cell.group, cell.task] |= cell.by_problem.keys()
    return [
        f"{cell.series.policy}, {cell.size.label}, on {cell.task.name}: {len(cell.by_problem)} of "
        f"{len(wanted[cell.group, cell.task])} problems ({cell.group.label})"
        for cell in cells
        if len(cell.by_problem) < len(wanted[cell.group, cell.task])
    ]


RIGHT, WRONG = 1, 2  # answers shown of each configuration
HEAD, TAIL = 500, 900  # characters shown of a longer answer, from its beginning and from its end


def sample_answers(store: ResultStore) -> list[tuple[str, list[Row]]]:
    """Return a description of each configuration, and some of its answers, right and wrong ones."""
    chosen = store.query(f"""
        SELECT {_COLUMNS}, text, answer, gold FROM samples
        QUALIFY row_number() OVER (PARTITION BY config, correct ORDER BY finish = 'no_room', problem, sample)
                <= CASE WHEN correct THEN {RIGHT} ELSE {WRONG} END
        ORDER BY task, policy, budget, decode_budget, model, seed, config, correct DESC, problem, sample
    """)
    answers = []
    for _, rows in groupby(chosen, key=lambda row: row["config"]):
        shortened = [row | {"text": _shortened(row["text"])} for row in rows]
        row = shortened[0]
        title = f"{row['task']}: {row['policy']}, {size_of(row).label}, seed {row['seed']}"
        answers.append((f"{title} ({_group_of(row).label})", shortened))
    return answers


def _shortened(text: str) -> str:
    left_out = len(text) - HEAD - TAIL
    if left_out <= 0:
        return text
    return f"{text[:HEAD]}\n\n[... {left_out:,} characters left out ...]\n\n{text[-TAIL:]}"
