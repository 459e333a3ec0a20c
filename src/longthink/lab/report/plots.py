"""Figures as PNG and PDF files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longthink.lab.report.escape import for_matplotlib
from longthink.lab.report.figures import Figure, Line, Panel

_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "cross": "P",
    "x": "X",
    "star": "*",
}
_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_COLUMNS = 3
_GRID = {"color": "#dddddd", "linewidth": 0.6}


def save_figures(figures: Sequence[Figure], folder: Path) -> None:
    """Write each figure to ``folder`` as NAME.png and NAME.pdf.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    from matplotlib.figure import Figure as Canvas

    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        columns = min(_COLUMNS, len(figure.panels))
        rows = -(-len(figure.panels) // columns)
        labels = {line.label for panel in figure.panels for line in panel.lines}
        legend_columns = columns + 1
        legend_height = 0.2 * -(-len(labels) // legend_columns)
        size = (1.0 + 4.4 * columns, 1.1 + 3.1 * rows + legend_height)
        canvas = Canvas(figsize=size, layout="constrained")
        all_axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
        handles: dict[str, Any] = {}
        for axes, panel in zip(all_axes, figure.panels, strict=False):
            _draw(axes, panel, figure, handles)
        for axes in all_axes[len(figure.panels) :]:
            axes.remove()
        canvas.legend(
            handles.values(), map(for_matplotlib, handles), loc="outside lower center", ncols=legend_columns,
            fontsize="small", frameon=False,
        )  # fmt: skip
        canvas.suptitle(for_matplotlib(figure.title))
        # No date inside: the same store gives the same files.
        canvas.savefig(folder / f"{figure.name}.png", dpi=150, metadata={"Software": None})
        canvas.set_layout_engine(
            "none"
        )  # what was laid out stays; doing it again takes as long as all the rest
        canvas.savefig(folder / f"{figure.name}.pdf", metadata={"CreationDate": None})


def _draw(axes: Any, panel: Panel, figure: Figure, handles: dict[str, Any]) -> None:
    for line in panel.lines:
        handles.setdefault(line.label, _draw_line(axes, line))
    if panel.x_ticks:
        from matplotlib.ticker import NullLocator

        axes.set_xscale("log", base=2)
        axes.set_xticks(panel.x_ticks, labels=[str(tick) for tick in panel.x_ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(panel.x_ticks[0] / 2**0.4, panel.x_ticks[-1] * 2**0.4)
    if figure.percent:
        from matplotlib.ticker import PercentFormatter

        axes.set_ylim(*figure.share_range)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif figure.log_y:
        from matplotlib.ticker import LogFormatter

        axes.set_yscale("log")
        # Powers of ten in figures, and as many of the ticks between them as there is room for.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    else:
        axes.set_ylim(bottom=0)
    axes.grid(**_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(for_matplotlib(panel.title), fontsize="small", wrap=True)
    axes.set_xlabel(for_matplotlib(figure.x_label), fontsize="small")
    axes.set_ylabel(for_matplotlib(figure.y_label), fontsize="small")


def _draw_line(axes: Any, line: Line) -> Any:
    """Draw a line and return what stands for it in the legend."""
    look = {"color": line.style.colour, "label": "_"}
    dash, marker = _DASHES[line.style.dash], _MARKERS[line.style.symbol]
    if line.kind == "level":
        if line.low:
            axes.axhspan(line.low[0], line.high[0], color=line.style.colour, alpha=0.12, linewidth=0)
        return axes.axhline(line.y[0], linestyle=dash, linewidth=1.8, **look)
    if line.kind == "cloud":
        return axes.scatter(line.x, line.y, s=14, marker=marker, alpha=0.65, linewidths=0, **look)
    spread = None
    if line.low:
        # Rounding may put the end of an interval a hair past its point.
        below = [max(0.0, y - low) for y, low in zip(line.y, line.low, strict=True)]
        above = [max(0.0, high - y) for y, high in zip(line.y, line.high, strict=True)]
        spread = [below, above]
    return axes.errorbar(
        line.x,
        line.y,
        yerr=spread,
        linestyle=dash,
        marker=marker,
        markersize=5,
        linewidth=1.5,
        capsize=2.5,
        **look,
    )
