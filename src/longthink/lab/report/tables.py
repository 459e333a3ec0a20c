"""The tables of a report."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from longthink.cli.table import Table
from longthink.lab.report.cells import Cell, Group, Row, Series, Size, Task, size_of
from longthink.lab.report.comparison import Comparison

Labels = dict[Series, str]
_CELL = dict.fromkeys(("model and decoding", "task", "max new tokens", "policy"), "text")
_SIZE = {"budget": "count", "decode budget": "count"}


def _names(cell: Cell, labels: Labels) -> list[Any]:
    limits = "/".join(map(str, cell.task.limits))
    sizes = [cell.size.tokens if cell.size.kind == kind else None for kind in ("budget", "decode_budget")]
    return [cell.group.label, cell.task.name, limits, labels[cell.series], *sizes]


def results_table(cells: Sequence[Cell], labels: Labels) -> Table:
    columns = _CELL | _SIZE | {
        "problems": "count", "samples": "count", "accuracy": "percent", "low": "percent", "high": "percent",
        "cut off": "percent", "no room": "percent", "tokens (median)": "number", "seconds (median)": "number",
        "kv MiB (median)": "mib", "dense kv MiB (median)": "mib",
    }  # fmt: skip
    rows = [
        [
            *_names(cell, labels), len(cell.by_problem), len(cell.rows), *cell.share("correct"),
            cell.share("cut_off")[0], cell.share("no_room")[0],
            *map(cell.median, ("generated_tokens", "seconds", "kv_bytes_peak", "dense_kv_bytes")),
        ]
        for cell in cells
    ]  # fmt: skip
    note = (
        "Low and high: Wilson 95 % interval, which counts problems. Several samples and seeds of a problem are "
        "averaged first. Medians leave out prompts without room."
    )
    return Table(name="results", title="Results", note=note, columns=columns, rows=rows)


def accuracy_table(cells: Sequence[Cell], labels: Labels) -> Table:
    sizes = sorted({cell.size for cell in cells})
    found: dict[tuple[Group, Task, Series], dict[Size, Cell]] = defaultdict(dict)
    for cell in cells:
        found[cell.group, cell.task, cell.series][cell.size] = cell
    rows = []
    for by_size in found.values():
        names = _names(next(iter(by_size.values())), labels)[: len(_CELL)]
        rows.append([*names, *(_share_of(by_size[size]) if size in by_size else None for size in sizes)])
    columns = _CELL | {size.label: "formatted" for size in sizes}
    note = "Share of problems that are right, its Wilson 95 % interval, and the number of problems."
    return Table(name="accuracy", title="Accuracy", note=note, columns=columns, rows=rows)


def _share_of(cell: Cell) -> str:
    share, low, high = (100 * part for part in cell.share("correct"))
    return f"{share:.1f} ({low:.0f} to {high:.0f}) of {len(cell.by_problem)}"


def comparison_table(
    comparisons: Sequence[Comparison], labels: Labels, name: str, title: str, before: str, after: str
) -> Table:
    """Return paired differences, the significant ones marked; ``before`` and ``after`` name the two sides."""
    columns = _CELL | _SIZE | {
        "problems": "count", "unpaired": "count", before: "percent", after: "percent", "difference": "points",
        "low": "points", "high": "points", "better on": "count", "worse on": "count", "p": "p", "p (Holm)": "p",
    }  # fmt: skip
    rows = [
        [
            *_names(one.cell, labels), one.problems, one.unpaired, one.before, one.after, one.difference.mean,
            one.difference.low, one.difference.high, one.better, one.worse, one.p, one.p_holm,
        ]
        for one in comparisons
    ]  # fmt: skip
    note = (
        "Differences in percentage points on the problems that both sides have (unpaired: problems of only one "
        "side), with 95 % intervals by a paired bootstrap over problems. p: McNemar's exact test (with several "
        f"samples of a problem, the sign test on their means), then adjusted by Holm for all {len(rows)} rows. "
        "Highlighted rows: adjusted p below 0.05."
    )
    marked = frozenset(i for i, one in enumerate(comparisons) if one.significant)
    return Table(name=name, title=title, note=note, columns=columns, rows=rows, marked=marked)


def measurements_table(rows: Sequence[Row]) -> Table:
    columns = {
        "kind": "text", "system": "text", "model": "text", "dtype": "text", **_SIZE, "rows": "count",
        "prompt tokens": "count", "decode tokens": "count", "ms per token": "number", "seconds": "number",
        "kv MiB": "mib", "metadata MiB": "mib", "process MiB": "mib", "device MiB": "mib", "filled": "text",
        "threads": "count", "run": "text",
    }  # fmt: skip
    names = (
        "kind system model dtype budget decode_budget rows prompt_tokens decode_tokens ms_per_token seconds kv_bytes "
        "metadata_bytes rss_bytes device_bytes"
    ).split()
    shown = []
    for row in sorted(
        rows, key=lambda row: (row["kind"], row["system"], size_of(row), row["run"], row["decode_tokens"])
    ):
        filled = "made-up keys" if row["fast_forwarded"] else ""
        shown.append([*(row[name] for name in names), filled, row["threads"], row["run"]])
    return Table(
        name="measurements", title="Measurements", note="Every measured point.", columns=columns, rows=shown
    )
