"""The figures as plain data: what is drawn, by plotly into the page and by matplotlib into files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from longthink.lab.report.cells import Cell, Group, Row, Series, Size, Task, size_of
from longthink.lab.report.style import Style

MIB = 2**20
CLOUD_POINTS = 100
"""Samples drawn of each policy in one panel; more would only hide each other."""
_DODGE = 0.05
"""Octaves between the points of two policies at the same budget, so that intervals do not hide each other..."""
_SPREAD = 0.15
"""... and between the first and the last, so that all stay at their budget."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points with one look: a ``curve``, a ``cloud`` of single samples, or a ``level`` without a place on the x axis.

    A level has one value in ``y``. ``low`` and ``high`` are the ends of intervals, or empty.
    """

    label: str
    style: Style
    kind: Literal["curve", "cloud", "level"]
    y: list[float]
    hover: list[str]
    x: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes."""

    title: str
    lines: list[Line]
    x_ticks: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels that share their axes' meaning. ``x_ticks`` of a panel mean a logarithmic axis.

    An axis of shares (`percent`) begins at `floor`; one that spans orders of magnitude is logarithmic (`log_y`).
    """

    name: str
    section: str
    title: str
    caption: str
    x_label: str
    y_label: str
    percent: bool = False
    floor: float = 0.0
    log_y: bool = False
    panels: list[Panel]

    @property
    def share_range(self) -> list[float]:
        """Ends of an axis of shares, with room for what lies on them."""
        room = 0.03 * (1 - self.floor)
        return [self.floor - room, 1 + room]


Metric = Callable[[Cell], tuple[float, float, float] | float]


@dataclass(frozen=True, kw_only=True)
class Look:
    """Names and styles of policies, the same in all figures."""

    labels: dict[Series, str]
    styles: dict[str, Style]


_BUDGETS = {
    "budget": ("budget (tokens)", "Budget: tokens kept per layer, prompt included."),
    "decode_budget": ("decode budget (tokens)", "Decode budget: tokens kept per layer on top of the prompt."),
}
_BY_BUDGET: tuple[tuple[str, str, str, str, Metric], ...] = (
    ("accuracy", "Accuracy", "right answers", "Bars: Wilson 95 % intervals.", lambda cell: cell.share("correct")),
    (
        "tokens",
        "Tokens generated",
        "tokens generated (median)",
        "Median over samples. A policy that loses the thread often writes on until it is cut off.",
        lambda cell: cell.median("generated_tokens"),
    ),
    (
        "cut-off",
        "Cut off",
        "answers cut off",
        "Share of answers that did not end by themselves (finish: length). Bars: Wilson 95 % intervals.",
        lambda cell: cell.share("cut_off"),
    ),
    (
        "no-room",
        "No room",
        "prompts without room",
        "Share of problems whose prompt does not fit in the budget (finish: no_room). They count as wrong, and not "
        "as cut off. Bars: Wilson 95 % intervals.",
        lambda cell: cell.share("no_room"),
    ),
)  # fmt: skip


def budget_figures(group: Group, number: int, cells: Sequence[Cell], look: Look) -> list[Figure]:
    """Return the figures over budgets of one group: one for each metric and each kind of budget."""
    figures = []
    kinds = {cell.size.kind for cell in cells} - {""} or {"budget"}
    for name, title, y_label, caption, metric in _BY_BUDGET:
        for kind in sorted(kinds):
            shown = [cell for cell in cells if cell.size.kind in ("", kind)]
            if name == "no-room" and not any(row["no_room"] for cell in shown for row in cell.rows):
                continue
            with_kind = {cell.task for cell in shown if cell.size.kind == kind}
            tasks = sorted(
                with_kind or {cell.task for cell in shown}, key=lambda task: (len(task.members), task)
            )
            figures.append(
                Figure(
                    name=f"{name}-{kind.replace('_', '-')}-{number}",
                    section=title,
                    title=f"{title} against {kind.replace('_', ' ')}",
                    caption=f"{caption} {_BUDGETS[kind][1]} {_SHARED_CAPTION}",
                    x_label=_BUDGETS[kind][0],
                    y_label=y_label,
                    percent=name != "tokens",
                    panels=[
                        _budget_panel(task, [c for c in shown if c.task == task], look, metric)
                        for task in tasks
                    ],
                )
            )
    return figures


_SHARED_CAPTION = (
    "Horizontal lines keep everything. Samples and seeds of a problem are averaged first; an interval counts "
    "problems. Points at the same budget stand a little apart to be seen."
)


def task_title(task: Task, tasks: Iterable[Task] = ()) -> str:
    """Return the task's name, with its token limit where other tasks have the same name."""
    if len(task.members) > 1:
        return f"{task.name} ({len(task.members)} tasks pooled)"
    same = [other for other in tasks if other.name == task.name]
    return task.name if len(same) < 2 else f"{task.name} (at most {task.limits[0]} tokens)"


def _budget_panel(task: Task, cells: list[Cell], look: Look, metric: Metric) -> Panel:
    problems = len(set().union(*(cell.by_problem for cell in cells)))
    series = sorted({cell.series for cell in cells if cell.size.kind}, key=look.labels.__getitem__)
    dodge = min(_DODGE, _SPREAD / max(1, len(series) - 1))
    lines = []
    for cell in cells:
        if not cell.size.kind:
            lines.append(_budget_line([cell], 0.0, look, metric))
    for i, one in enumerate(series):
        mine = [cell for cell in cells if cell.series == one and cell.size.kind]
        lines.append(_budget_line(mine, dodge * (i - (len(series) - 1) / 2), look, metric))
    ticks = sorted({cell.size.tokens for cell in cells if cell.size.kind})
    limits = "/".join(map(str, task.limits))
    title = f"{task_title(task)}: {problems} problems, at most {limits} tokens"
    return Panel(title=title, lines=lines, x_ticks=ticks or [1])


def _budget_line(cells: list[Cell], shift: float, look: Look, metric: Metric) -> Line:
    label = look.labels[cells[0].series]
    values = [value if isinstance(value := metric(cell), tuple) else (value,) * 3 for cell in cells]
    shares = any(low != high for _, low, high in values)
    hover = []
    for cell, (value, low, high) in zip(cells, values, strict=True):
        shown = f"{value:.1%} ({low:.1%} to {high:.1%})" if shares else f"{value:,.0f}"
        hover.append(
            f"{label}, {cell.size.label}\n{shown}\n{len(cell.by_problem)} problems, {len(cell.rows)} samples"
        )
    return Line(
        label=label,
        style=look.styles[label],
        kind="curve" if cells[0].size.kind else "level",
        x=[cell.size.tokens * 2**shift for cell in cells if cell.size.kind],
        y=[value for value, _, _ in values],
        low=[low for _, low, _ in values] if shares else [],
        high=[high for _, _, high in values] if shares else [],
        hover=hover,
    )


def sample_figures(group: Group, number: int, cells: Sequence[Cell], look: Look) -> list[Figure]:
    """Return time and memory of single samples against their length, one panel for each size of cache."""
    sizes = sorted({cell.size for cell in cells if cell.size.kind}) or [Size("", 0)]
    figures = []
    for name, section, column, unit, y_label, caption in (
        (
            "jct-samples",
            "Time",
            "seconds",
            1,
            "job completion time (s)",
            "One point for each answer: wall-clock time from prompt to last token, with several rows decoded side by "
            "side and a queue of problems behind them. The measured curves are the ones to compare times with.",
        ),
        (
            "memory-samples",
            "Memory",
            "kv_bytes_peak",
            MIB,
            "peak memory (MiB per row)",
            "One point for each answer: bytes allocated for keys and values, divided by the rows that share them.",
        ),
    ):
        panels = []
        for size in sizes:
            shown = [cell for cell in cells if cell.size == size or not cell.size.kind]
            lines = _clouds(shown, look, column, unit)
            panels.append(Panel(title=size.label, lines=lines))
        figures.append(
            Figure(
                name=f"{name}-{number}",
                section=section,
                title=f"{section} of each answer against its length",
                caption=f"{caption} At most {CLOUD_POINTS} answers of each policy are drawn, evenly chosen.",
                x_label="tokens generated",
                y_label=y_label,
                panels=panels,
            )
        )
    return figures


def _clouds(cells: Sequence[Cell], look: Look, column: str, unit: int) -> list[Line]:
    by_series: dict[Series, list[Row]] = defaultdict(list)
    for cell in cells:
        by_series[cell.series] += [row for row in cell.rows if not row["no_room"]]
    lines = []
    for series, rows in sorted(by_series.items()):
        rows = sorted(rows, key=lambda row: (row["generated_tokens"], row["task"], row["problem"]))
        step = max(1, -(-len(rows) // CLOUD_POINTS))
        rows = rows[::step]
        label = look.labels[series]
        hover = [
            f"{label}, {size_of(row).label}\n{row[column] / unit:,.2f} at {row['generated_tokens']:,} tokens\n"
            f"{row['task']}, {row['problem']}, {row['rows']} rows side by side"
            for row in rows
        ]
        lines.append(
            Line(
                label=label,
                style=look.styles[label],
                kind="cloud",
                x=[float(row["generated_tokens"]) for row in rows],
                y=[row[column] / unit for row in rows],
                hover=hover,
            )
        )
    return lines
