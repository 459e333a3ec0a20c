"""Figures as data: what is drawn, whatever it is drawn on."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from longthink.lab.report.cells import Cell, Group, Row, Series, Size, Task, size_of
from longthink.lab.report.style import Style

MIB = 2**20
CLOUD_POINTS = 100  # samples drawn of each policy in one panel; more would only hide each other
_DODGE = 0.05  # octaves between the points of two policies at one budget, to show both intervals ...
_SPREAD = 0.15  # ... and between the first and the last, so that all stay at their budget


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points of one style: a ``curve``, a ``cloud`` of single samples, or a ``level``, which has one y and no x.

    ``hover`` has a text for each point. ``low`` and ``high`` are the ends of intervals, or empty.
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
    """One pair of axes; with ``x_ticks`` the x axis is logarithmic."""

    title: str
    lines: list[Line]
    x_ticks: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels with the same axes and one legend.

    The y axis is linear, one of shares that begins at ``floor`` (``percent``), or logarithmic (``log_y``).
    """

    name: str
    section: str
    title: str
    caption: str
    x_label: str
    y_label: str
    panels: list[Panel]
    subtitle: str = ""
    percent: bool = False
    floor: float = 0.0
    log_y: bool = False

    @property
    def legend(self) -> dict[str, Line]:
        legend: dict[str, Line] = {}
        for line in (line for panel in self.panels for line in panel.lines):
            legend.setdefault(line.label, line)
        return legend


@dataclass(frozen=True, kw_only=True)
class Look:
    labels: dict[Series, str]
    styles: dict[str, Style]


Interval = tuple[float, float, float]

_BUDGETS = {
    "budget": "Budget: tokens kept per layer, prompt included.",
    "decode_budget": "Decode budget: tokens kept per layer on top of the prompt.",
}
_WILSON = "Bars: Wilson 95 % intervals."
_METRICS: tuple[tuple[str, str, str, str, Callable[[Cell], Interval | float]], ...] = (
    ("accuracy", "Accuracy", "right answers", _WILSON, lambda cell: cell.share("correct")),
    (
        "tokens", "Tokens generated", "tokens generated (median)",
        "Median over samples. A policy that loses the thread often generates until it is cut off.",
        lambda cell: cell.median("generated_tokens"),
    ),
    (
        "cut-off", "Cut off", "answers cut off",
        f"Share of answers that reached the token limit (finish: length). {_WILSON}",
        lambda cell: cell.share("cut_off"),
    ),
    (
        "no-room", "No room", "prompts without room",
        "Share of problems whose prompt does not fit into the budget (finish: no_room). They count as wrong, and not "
        f"as cut off. {_WILSON}",
        lambda cell: cell.share("no_room"),
    ),
)  # fmt: skip
_SHARED_CAPTION = (
    "Horizontal lines keep everything. Samples and seeds of a problem are averaged first; an interval counts "
    "problems. Points at the same budget are drawn slightly apart."
)


def budget_figures(group: Group, number: int, cells: Sequence[Cell], look: Look) -> list[Figure]:
    figures = []
    for name, title, y_label, caption, metric in _METRICS:
        for kind in sorted({cell.size.kind for cell in cells} - {""} or {"budget"}):
            shown = [cell for cell in cells if cell.size.kind in ("", kind)]
            if name == "no-room" and not any(row["no_room"] for cell in shown for row in cell.rows):
                continue
            tasks = {cell.task for cell in shown if cell.size.kind == kind} or {cell.task for cell in shown}
            words = kind.replace("_", " ")
            panels = [
                _budget_panel(task, [cell for cell in shown if cell.task == task], look, metric)
                for task in sorted(tasks, key=lambda task: (len(task.members), task))
            ]
            figures.append(Figure(
                name=f"{name}-{kind.replace('_', '-')}-{number}", section=title,
                title=f"{title} against {words}", subtitle=group.label,
                caption=f"{caption} {_BUDGETS[kind]} {_SHARED_CAPTION}", x_label=f"{words} (tokens)",
                y_label=y_label, percent=name != "tokens", panels=panels,
            ))  # fmt: skip
    return figures


def _budget_panel(
    task: Task, cells: list[Cell], look: Look, metric: Callable[[Cell], Interval | float]
) -> Panel:
    problems = len(set().union(*(cell.by_problem for cell in cells)))
    series = sorted({cell.series for cell in cells if cell.size.kind}, key=look.labels.__getitem__)
    dodge = min(_DODGE, _SPREAD / max(1, len(series) - 1))
    lines = [_budget_line([cell], 0.0, look, metric) for cell in cells if not cell.size.kind]
    for i, one in enumerate(series):
        mine = [cell for cell in cells if cell.series == one and cell.size.kind]
        lines.append(_budget_line(mine, dodge * (i - (len(series) - 1) / 2), look, metric))
    pooled = f" ({len(task.members)} tasks pooled)" if len(task.members) > 1 else ""
    limits = "/".join(map(str, task.limits))
    return Panel(
        title=f"{task.name}{pooled}: {problems} problems, at most {limits} tokens",
        lines=lines,
        x_ticks=sorted({cell.size.tokens for cell in cells if cell.size.kind}) or [1],
    )


def _budget_line(
    cells: list[Cell], shift: float, look: Look, metric: Callable[[Cell], Interval | float]
) -> Line:
    label = look.labels[cells[0].series]
    values = [value if isinstance(value := metric(cell), tuple) else (value,) * 3 for cell in cells]
    has_intervals = any(low != high for _, low, high in values)
    hover = []
    for cell, (value, low, high) in zip(cells, values, strict=True):
        shown = f"{value:.1%} ({low:.1%} to {high:.1%})" if has_intervals else f"{value:,.0f}"
        counts = f"{len(cell.by_problem)} problems, {len(cell.rows)} samples"
        hover.append(f"{label}, {cell.size.label}\n{shown}\n{counts}")
    return Line(
        label=label, style=look.styles[label], kind="curve" if cells[0].size.kind else "level",
        x=[cell.size.tokens * 2**shift for cell in cells if cell.size.kind],
        y=[value for value, _, _ in values], low=[low for _, low, _ in values] if has_intervals else [],
        high=[high for _, _, high in values] if has_intervals else [], hover=hover,
    )  # fmt: skip


_SAMPLED = (
    (
        "jct-samples", "Time", "seconds", 1, "job completion time (s)",
        "One point for each answer: wall-clock time from prompt to last token, in a batch and with other problems "
        "waiting. Compare times by the measured curves instead.",
    ),
    (
        "memory-samples", "Memory", "kv_bytes_peak", MIB, "peak memory (MiB per row)",
        "One point for each answer: bytes allocated for keys and values, divided by the rows that share them.",
    ),
)  # fmt: skip


def sample_figures(group: Group, number: int, cells: Sequence[Cell], look: Look) -> list[Figure]:
    sizes = sorted({cell.size for cell in cells if cell.size.kind}) or [Size("", 0)]
    figures = []
    for name, section, column, unit, y_label, caption in _SAMPLED:
        panels = []
        for size in sizes:
            shown = [cell for cell in cells if cell.size == size or not cell.size.kind]
            panels.append(Panel(title=size.label, lines=_clouds(shown, look, column, unit)))
        figures.append(Figure(
            name=f"{name}-{number}", section=section,
            title=f"{section} of each answer against its length", subtitle=group.label,
            caption=f"{caption} At most {CLOUD_POINTS} answers of each policy are drawn, evenly chosen.",
            x_label="tokens generated", y_label=y_label, panels=panels,
        ))  # fmt: skip
    return figures


def _clouds(cells: Sequence[Cell], look: Look, column: str, unit: int) -> list[Line]:
    by_series: dict[Series, list[Row]] = defaultdict(list)
    for cell in cells:
        by_series[cell.series] += [row for row in cell.rows if not row["no_room"]]
    lines = []
    for series, rows in sorted(by_series.items()):
        rows = sorted(rows, key=lambda row: (row["generated_tokens"], row["task"], row["problem"]))
        rows = rows[:: max(1, -(-len(rows) // CLOUD_POINTS))]
        label = look.labels[series]
        hover = [
            f"{label}, {size_of(row).label}\n{row[column] / unit:,.2f} at {row['generated_tokens']:,} tokens\n"
            f"{row['task']}, {row['problem']}, batch of {row['rows']}"
            for row in rows
        ]
        x, y = [float(row["generated_tokens"]) for row in rows], [row[column] / unit for row in rows]
        lines.append(Line(label=label, style=look.styles[label], kind="cloud", x=x, y=y, hover=hover))
    return lines
