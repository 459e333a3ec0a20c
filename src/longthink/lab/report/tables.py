"""Tables of a report: as CSV with plain numbers, as Markdown and as HTML with readable ones."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longthink.lab.report.cells import Cell, Group, Row, Series, Size, Task, size_of
from longthink.lab.report.comparison import Comparison
from longthink.lab.report.escape import for_html, for_markdown
from longthink.lab.report.figures import MIB, Look

_SHOW: dict[str, Callable[[Any], str]] = {
    "text": str,
    "share": str,
    "count": lambda value: f"{value:,}",
    "percent": lambda value: f"{value:.1%}",
    "points": lambda value: f"{100 * value:+.1f}",
    "p": lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",
    "number": lambda value: f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}",
    "mib": lambda value: f"{value / MIB:,.2f}",
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Named columns with one kind each (a key of ``_SHOW``), and rows of raw values; None is an empty cell."""

    name: str
    title: str
    note: str
    columns: dict[str, str]
    rows: list[list[Any]]

    def shown(self) -> tuple[dict[str, str], list[list[str]], str]:
        """Return columns, cells and note as people read them: what is the same in all rows is said once."""
        columns, places, same = {}, [], []
        for place, (name, kind) in enumerate(self.columns.items()):
            values = {row[place] for row in self.rows}
            if len(self.rows) > 1 and len(values) == 1 and (kind == "text" or values == {None}):
                same += [f"{name} {_show(kind, value)}" for value in values if value not in (None, "")]
            else:
                columns[name] = kind
                places.append(place)
        kinds = list(self.columns.values())
        cells = [[_show(kinds[place], row[place]) for place in places] for row in self.rows]
        note = f"{self.note} In all rows: {'; '.join(same)}." if same else self.note
        return columns, cells, note

    def csv(self) -> str:
        """Return the table with raw values (memory in bytes), a header first."""
        text = io.StringIO()
        # A lone carriage return would not be quoted otherwise, and ends a row for most readers.
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(name.replace("MiB", "bytes").replace(" ", "_") for name in self.columns)
        writer.writerows(self.rows)
        return text.getvalue()

    def markdown(self) -> str:
        """Return the table with its title and note."""
        columns, cells, note = self.shown()
        rules = ["---" if kind == "text" else "---:" for kind in columns.values()]
        head = [f"## {self.title}", "", for_markdown(note), ""]
        lines = [columns, rules, *([for_markdown(cell) for cell in row] for row in cells)]
        return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines), ""])

    def html(self, marked: Sequence[bool] = ()) -> str:
        """Return note and table as HTML; rows for which ``marked`` is true stand out."""
        columns, rows, note = self.shown()
        kinds = [' class="text"' if kind == "text" else "" for kind in columns.values()]
        head = "".join(f"<th{kind}>{for_html(name)}</th>" for kind, name in zip(kinds, columns, strict=True))
        body = []
        for i, row in enumerate(rows):
            cells = "".join(f"<td{kind}>{for_html(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
            body.append(f'<tr class="marked">{cells}</tr>' if marked and marked[i] else f"<tr>{cells}</tr>")
        return (
            f'<p class="quiet">{for_html(note)}</p><div class="scroll"><table id="{for_html(self.name)}">'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        )

    def save(self, folder: Path) -> None:
        """Write NAME.csv and NAME.md into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.csv").write_text(self.csv(), encoding="utf-8")
        (folder / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")


def _show(kind: str, value: Any) -> str:
    return "" if value is None else _SHOW[kind](value)


_CELL = {"model and decoding": "text", "task": "text", "max new tokens": "text", "policy": "text"}
_SIZE = {"budget": "count", "decode budget": "count"}


def _names(cell: Cell, look: Look) -> list[Any]:
    limits = "/".join(map(str, cell.task.limits))
    sizes = [cell.size.tokens if cell.size.kind == kind else None for kind in ("budget", "decode_budget")]
    return [cell.group.label, cell.task.name, limits, look.labels[cell.series], *sizes]


def results_table(cells: Sequence[Cell], look: Look) -> Table:
    """Return accuracy, length, time and memory of every cell."""
    columns = _CELL | _SIZE | {
        "problems": "count", "samples": "count", "accuracy": "percent", "low": "percent", "high": "percent",
        "cut off": "percent", "no room": "percent", "tokens (median)": "number", "seconds (median)": "number",
        "kv MiB (median)": "mib", "dense kv MiB (median)": "mib",
    }  # fmt: skip
    rows = [
        [
            *_names(cell, look),
            len(cell.by_problem),
            len(cell.rows),
            *cell.share("correct"),
            cell.share("cut_off")[0],
            cell.share("no_room")[0],
            *map(cell.median, ("generated_tokens", "seconds", "kv_bytes_peak", "dense_kv_bytes")),
        ]
        for cell in cells
    ]
    note = (
        "Low and high: Wilson 95 % interval, which counts problems. Several samples and seeds of a problem are "
        "averaged first. Medians leave out prompts without room."
    )
    return Table(name="results", title="Results", note=note, columns=columns, rows=rows)


def accuracy_table(cells: Sequence[Cell], look: Look) -> Table:
    """Return accuracy with its interval at a glance: a line per policy, a column per size."""
    sizes = sorted({cell.size for cell in cells})
    found: dict[tuple[Group, Task, Series], dict[Size, Cell]] = defaultdict(dict)
    for cell in cells:
        found[cell.group, cell.task, cell.series][cell.size] = cell
    rows = []
    for by_size in found.values():
        names = _names(next(iter(by_size.values())), look)[: len(_CELL)]
        shown = [_share_of(by_size[size]) if size in by_size else None for size in sizes]
        rows.append([*names, *shown])
    columns = _CELL | {size.label: "share" for size in sizes}
    note = "Share of problems that are right, its Wilson 95 % interval, and the number of problems."
    return Table(name="accuracy", title="Accuracy", note=note, columns=columns, rows=rows)


def _share_of(cell: Cell) -> str:
    share, low, high = (100 * part for part in cell.share("correct"))
    return f"{share:.1f} ({low:.0f} to {high:.0f}) of {len(cell.by_problem)}"


def comparison_table(
    comparisons: Sequence[Comparison], look: Look, *, name: str, title: str, before: str, after: str
) -> Table:
    """Return paired differences; ``before`` and ``after`` name the two sides."""
    columns = _CELL | _SIZE | {
        "problems": "count", "unpaired": "count", before: "percent", after: "percent", "difference": "points",
        "low": "points", "high": "points", "better on": "count", "worse on": "count", "p": "p", "p (Holm)": "p",
    }  # fmt: skip
    rows = [
        [
            *_names(one.cell, look), one.problems, one.unpaired, one.before, one.after,
            one.difference.mean, one.difference.low, one.difference.high, one.better, one.worse, one.p, one.p_holm,
        ]
        for one in comparisons
    ]  # fmt: skip
    note = (
        "Differences in percentage points on the problems that both sides have (unpaired: problems of only one "
        "side), with 95 % intervals by a paired bootstrap over problems. p: McNemar's exact test (with several "
        f"samples of a problem, the sign test on their means), then adjusted by Holm for all {len(rows)} rows. "
        "Rows that stand out: adjusted p below 0.05."
    )
    return Table(name=name, title=title, note=note, columns=columns, rows=rows)


def measurements_table(rows: Sequence[Row]) -> Table:
    """Return every measured point."""
    columns = {
        "kind": "text", "system": "text", "model": "text", "dtype": "text", **_SIZE, "rows": "count",
        "prompt tokens": "count", "decode tokens": "count", "ms per token": "number", "seconds": "number",
        "kv MiB": "mib", "metadata MiB": "mib", "process MiB": "mib", "device MiB": "mib", "filled": "text",
        "threads": "count", "run": "text",
    }  # fmt: skip
    order = sorted(
        rows, key=lambda row: (row["kind"], row["system"], size_of(row), row["run"], row["decode_tokens"])
    )
    names = (
        "kind system model dtype budget decode_budget rows prompt_tokens decode_tokens ms_per_token seconds kv_bytes "
        "metadata_bytes rss_bytes device_bytes"
    ).split()
    shown = [
        [
            *(row[name] for name in names),
            "made-up keys" if row["fast_forwarded"] else "",
            row["threads"],
            row["run"],
        ]
        for row in order
    ]
    note = "Every measured point."
    return Table(name="measurements", title="Measurements", note=note, columns=columns, rows=shown)
