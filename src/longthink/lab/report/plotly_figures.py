"""Figures as the JSON that plotly draws in the page. Colours of text and grid are the page's, set by its script."""

from __future__ import annotations

from math import log10
from typing import Any

from longthink.lab.report.escape import for_plotly
from longthink.lab.report.figures import Figure, Line, Panel


def plotly_panel(panel: Panel, figure: Figure) -> dict[str, Any]:
    """Return ``data`` and ``layout`` of one panel."""
    ends = _ends(panel)
    return {
        "data": [trace for line in panel.lines for trace in _traces(line, ends)],
        "layout": {
            "xaxis": _x_axis(panel, figure),
            "yaxis": _y_axis(figure),
            "margin": {"l": 62, "r": 14, "t": 10, "b": 52},
            "showlegend": False,
            "hovermode": "closest",
            "hoverlabel": {"align": "left", "namelength": 0},
            "height": 300,
        },
    }


def _ends(panel: Panel) -> list[float]:
    """Return the left and right end of horizontal lines."""
    if panel.x_ticks:
        return [panel.x_ticks[0] / 2**0.4, panel.x_ticks[-1] * 2**0.4]
    places = [x for line in panel.lines for x in line.x] or [1.0]
    return [0.0, max(places)]


def _x_axis(panel: Panel, figure: Figure) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": for_plotly(figure.x_label)}, "zeroline": False}
    if panel.x_ticks:
        ticks = {"tickvals": panel.x_ticks, "ticktext": [str(tick) for tick in panel.x_ticks]}
        return axis | ticks | {"type": "log", "range": [log10(end) for end in _ends(panel)]}
    return axis | {"rangemode": "tozero"}


def _y_axis(figure: Figure) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": for_plotly(figure.y_label)}, "zeroline": False}
    if figure.percent:
        return axis | {"tickformat": "~%", "range": figure.share_range}
    if figure.log_y:
        return axis | {"type": "log", "dtick": "D2"}
    return axis | {"rangemode": "tozero"}


def _traces(line: Line, ends: list[float]) -> list[dict[str, Any]]:
    colour = line.style.colour
    hover = [for_plotly(text) for text in line.hover]
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": for_plotly(line.label),
        "x": line.x,
        "y": line.y,
        "hoverinfo": "text",
        "hovertext": hover,
        "marker": {"color": colour, "symbol": line.style.symbol, "size": 8},
        "line": {"color": colour, "dash": line.style.dash, "width": 2},
    }
    if line.kind == "level":
        # Several points, so that the pointer finds the line anywhere.
        places = [ends[0] + (ends[1] - ends[0]) * i / 24 for i in range(25)]
        level = trace | {"mode": "lines", "x": places, "y": line.y * 25, "hovertext": hover * 25}
        if not line.low:
            return [level]
        band = {
            "type": "scatter",
            "mode": "lines",
            "x": [ends[0], ends[1], ends[1], ends[0]],
            "y": [line.low[0], line.low[0], line.high[0], line.high[0]],
            "fill": "toself",
            "fillcolor": f"{colour}22",
            "line": {"width": 0},
            "hoverinfo": "skip",
        }
        return [band, level]
    if line.kind == "cloud":
        return [trace | {"mode": "markers", "marker": trace["marker"] | {"size": 6, "opacity": 0.65}}]
    if line.low:
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [high - y for y, high in zip(line.y, line.high, strict=True)],
            "arrayminus": [y - low for y, low in zip(line.y, line.low, strict=True)],
            "thickness": 1.2,
            "width": 3,
            "color": colour,
        }
    return [trace | {"mode": "lines+markers"}]
