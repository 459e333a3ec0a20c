"""The one place where figures are drawn: as SVG for the page, and as PNG and PDF files."""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

from longthink.cli.text import visible
from longthink.lab.report.figures import Figure, Line, Panel
from longthink.lab.report.style import FOREGROUND, GRID, Style

_COLUMNS = 3
_PAGE_COLOURS = {FOREGROUND: "var(--text)", GRID: "var(--grid)"}
"""On a page text and grid follow its colours, in light and in dark."""


def _settings(**more: Any) -> AbstractContextManager[None]:
    import matplotlib as mpl

    colours = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), FOREGROUND
    )
    look = {"grid.color": GRID, "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False}
    return mpl.rc_context(colours | look | {"text.parse_math": False} | more)


def line_id(figure: Figure, panel: int, line: int) -> str:
    """Id, on the page, of the element that holds a line's points."""
    return f"{figure.name}-{panel}-line-{line}"


def panel_svg(figure: Figure, number: int) -> str:
    """A panel of a figure, without its title, as an SVG element for the page."""
    from matplotlib.figure import Figure as Canvas

    name = f"{figure.name}-{number}"
    with _svg_settings(name):
        canvas = Canvas(figsize=(4.0, 2.8))
        axes = canvas.add_axes((0.165, 0.17, 0.815, 0.79))
        for i, artist in enumerate(_draw(axes, figure.panels[number], figure)):
            artist.set_gid(line_id(figure, number, i))
        return _svg(canvas)


@cache
def swatch_svg(style: Style, kind: str) -> str:
    from matplotlib.figure import Figure as Canvas

    with _svg_settings(f"{style}{kind}"):
        canvas = Canvas(figsize=(26 / 72, 16 / 72))
        axes = canvas.add_axes((0, 0, 1, 1), xlim=(0, 2), ylim=(0, 2))
        axes.set_axis_off()
        axes.plot((0, 1, 2), (1, 1, 1), markevery=(1, 5), **_look(style, kind))
        return _svg(canvas)


def _svg_settings(name: str) -> AbstractContextManager[None]:
    # The salt makes the ids of markers and clips unique on a page.
    return _settings(
        **{"svg.fonttype": "none", "svg.hashsalt": name, "figure.facecolor": "none", "axes.facecolor": "none"}
    )


def _svg(canvas: Any) -> str:
    text = io.StringIO()
    canvas.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue().partition("<svg")[2]
    # A style sheet in it would hold for the whole page, which has these rules itself.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    for colour, variable in _PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    # Ids such as "xtick_1" are in every figure: on a page they are classes.
    return re.sub(r'id="([\w.]+)_\d+"', r'class="\1"', f'<svg aria-hidden="true"{svg}')


def save_figures(figures: Sequence[Figure], folder: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        columns = min(_COLUMNS, len(figure.panels))
        rows = -(-len(figure.panels) // columns)
        legend_rows = -(-len(figure.legend) // (columns + 1))
        with _settings():
            size = (1.0 + 4.4 * columns, 1.1 + 3.1 * rows + 0.2 * legend_rows)
            canvas = Canvas(figsize=size, layout="constrained")
            handles: dict[str, Any] = {}
            for i, panel in enumerate(figure.panels):
                axes = canvas.add_subplot(rows, columns, i + 1)
                for line, artist in zip(panel.lines, _draw(axes, panel, figure), strict=True):
                    handles.setdefault(visible(line.label), artist)
                axes.set_title(visible(panel.title), fontsize="small", wrap=True)
            canvas.legend(
                handles.values(), handles, loc="outside lower center", ncols=columns + 1, fontsize="small",
                frameon=False,
            )  # fmt: skip
            canvas.suptitle(visible(figure.title))
            # No dates inside: the same store gives the same files.
            canvas.savefig(folder / f"{figure.name}.png", dpi=150, metadata={"Software": None})
            canvas.set_layout_engine(
                "none"
            )  # keeps the layout, which takes as long to compute as all the rest
            canvas.savefig(folder / f"{figure.name}.pdf", metadata={"CreationDate": None})


def _draw(axes: Any, panel: Panel, figure: Figure) -> list[Any]:
    """Draw a panel and return the artist of each line, which holds its points."""
    from matplotlib.ticker import LogFormatter, NullLocator, PercentFormatter

    artists = [_draw_line(axes, line) for line in panel.lines]
    if panel.x_ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(panel.x_ticks, labels=[str(tick) for tick in panel.x_ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(panel.x_ticks[0] / 2**0.4, panel.x_ticks[-1] * 2**0.4)
    if figure.percent:
        room = 0.03 * (1 - figure.floor)
        axes.set_ylim(figure.floor - room, 1 + room)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif figure.log_y:
        axes.set_yscale("log")
        # Powers of ten in digits, and as many of the ticks between them as there is room for.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    else:
        axes.set_ylim(bottom=0)
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    axes.set_xlabel(figure.x_label, fontsize="small")
    axes.set_ylabel(figure.y_label, fontsize="small")
    axes.tick_params(labelsize="small")
    return artists


def _look(style: Style, kind: str) -> dict[str, Any]:
    look: dict[str, Any] = {"color": style.colour}
    if kind == "level":
        return look | {"linestyle": style.dash, "linewidth": 1.8}
    if kind == "cloud":
        return look | {"linestyle": "none", "marker": style.marker, "ms": 5, "mew": 0, "alpha": 0.65}
    return look | {"linestyle": style.dash, "marker": style.marker, "markersize": 5.5, "linewidth": 1.5}


def _draw_line(axes: Any, line: Line) -> Any:
    look = _look(line.style, line.kind)
    if line.kind == "level":
        if line.low:
            axes.axhspan(line.low[0], line.high[0], color=line.style.colour, alpha=0.12, linewidth=0)
        return axes.axhline(line.y[0], **look)
    if line.low:
        # Rounding may put the end of an interval just beyond its point.
        below = [max(0.0, y - low) for y, low in zip(line.y, line.low, strict=True)]
        above = [max(0.0, high - y) for y, high in zip(line.y, line.high, strict=True)]
        return axes.errorbar(line.x, line.y, yerr=[below, above], capsize=2.5, elinewidth=1.2, **look)[0]
    return axes.plot(line.x, line.y, **look)[0]
