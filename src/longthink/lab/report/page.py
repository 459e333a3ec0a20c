"""The page: one HTML file that holds everything it shows and asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from longthink.lab.report.escape import for_html, for_script
from longthink.lab.report.figures import Figure
from longthink.lab.report.plotly_figures import plotly_panel
from longthink.lab.report.style import Style

_DASH_ARRAYS = {"solid": "", "dash": "6 4", "dot": "2 3", "dashdot": "7 3 2 3"}
_SHAPES = {
    "circle": "M17 8a4 4 0 1 0-8 0a4 4 0 1 0 8 0z",
    "square": "M9.4 4.4h7.2v7.2h-7.2z",
    "diamond": "M13 3l5 5-5 5-5-5z",
    "triangle-up": "M13 3.4l4.8 8.2h-9.6z",
    "triangle-down": "M13 12.6l4.8-8.2h-9.6z",
    "cross": "M11.4 3.4h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z",
    "x": "M9.2 6.4l2.2-2.2 1.6 1.6 1.6-1.6 2.2 2.2-1.6 1.6 1.6 1.6-2.2 2.2-1.6-1.6-1.6 1.6-2.2-2.2 1.6-1.6z",
    "star": "M13 2.6l1.5 3.6 3.9.3-3 2.5 1 3.8-3.4-2.1-3.4 2.1 1-3.8-3-2.5 3.9-.3z",
}


@dataclass(kw_only=True)
class Page:
    """Collects sections in order, and figures by section, and writes them out as one HTML file.

    Attributes
    ----------
    data
        JSON documents for scripts, by the id of the element that holds them.
    parts
        Names of further scripts and style sheets of this package that the page needs.
    """

    title: str
    summary: str
    sections: dict[str, list[str]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    _panels: dict[str, Any] = field(default_factory=dict)

    def add(self, section: str, content: str) -> None:
        """Append HTML to a section, which is made where it is new."""
        self.sections.setdefault(section, []).append(content)

    def add_figure(self, figure: Figure, subtitle: str = "") -> None:
        """Append a figure to its section, with one legend for all its panels."""
        looks: dict[str, tuple[Style, str]] = {}
        for line in (line for panel in figure.panels for line in panel.lines):
            looks.setdefault(line.label, (line.style, line.kind))
        panels = []
        for i, panel in enumerate(figure.panels):
            name = f"{figure.name}-{i}"
            self._panels[name] = plotly_panel(panel, figure)
            panels.append(
                f'<div class="panel"><h4>{for_html(panel.title)}</h4><div class="plot" id="{for_html(name)}" '
                f'role="img" aria-label="{for_html(figure.title)}: {for_html(panel.title)}"></div></div>'
            )
        subtitled = f'<p class="quiet">{for_html(subtitle)}</p>' if subtitle else ""
        legend = "".join(
            f"<li>{_swatch(style, kind)}<span>{for_html(label)}</span></li>"
            for label, (style, kind) in looks.items()
        )
        self.add(
            figure.section,
            f'<figure style="margin:0"><h3>{for_html(figure.title)}</h3>{subtitled}'
            f'<p class="quiet">{for_html(figure.caption)}</p><ul class="legend">{legend}</ul>'
            f'<div class="panels">{"".join(panels)}</div></figure>',
        )

    def save(self, path: Path) -> None:
        """Write the file in one go: whoever reads it meanwhile sees the old one."""
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(self.html(), encoding="utf-8")
        os.replace(temporary, path)

    def html(self) -> str:
        """Return the file's text."""
        from plotly.offline import get_plotlyjs

        folder = files("longthink.lab.report")
        names = ("page", *self.parts)
        scripts = [get_plotlyjs(), *((folder / f"{name}.js").read_text(encoding="utf-8") for name in names)]
        style = "".join((folder / f"{name}.css").read_text(encoding="utf-8") for name in names)
        # Should anything foreign ever get past the escapes, the browser still runs these scripts and no other.
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
            f"form-action 'none'; script-src {' '.join(map(_hash_source, scripts))}"
        )
        places = {section: f"section-{i}" for i, section in enumerate(self.sections)}
        links = "".join(
            f'<li><a href="#{name}">{for_html(section)}</a></li>' for section, name in places.items()
        )
        body = "".join(
            f'<section id="{places[section]}"><h2>{for_html(section)}</h2>{"".join(parts)}</section>'
            for section, parts in self.sections.items()
        )
        return "\n".join(
            (
                "<!DOCTYPE html>",
                '<html lang="en"><head><meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">',
                f"<title>{for_html(self.title)}</title>",
                f"<style>{style}</style></head><body>",
                f'<header><h1>{for_html(self.title)}</h1><p class="quiet">{for_html(self.summary)}</p></header>',
                f"<nav><ul>{links}</ul></nav><main>{body}</main>",
                *(
                    f'<script type="application/json" id="{name}">{for_script(document)}</script>'
                    for name, document in ({"panels": self._panels} | self.data).items()
                ),
                *(f"<script>{script}</script>" for script in scripts),
                "</body></html>\n",
            )
        )


def items(texts: Sequence[str]) -> str:
    """Return a plain list."""
    return f'<ul class="plain">{"".join(f"<li>{for_html(text)}</li>" for text in texts)}</ul>'


def paragraph(text: str, *, quiet: bool = False) -> str:
    """Return a paragraph."""
    return f'<p class="quiet">{for_html(text)}</p>' if quiet else f"<p>{for_html(text)}</p>"


def _swatch(style: Style, kind: str) -> str:
    """Return a small drawing of a line's look."""
    parts = []
    if kind != "cloud":
        dashes = f' stroke-dasharray="{_DASH_ARRAYS[style.dash]}"' if _DASH_ARRAYS[style.dash] else ""
        parts.append(f'<path d="M0 8h26" fill="none" stroke="{style.colour}" stroke-width="2"{dashes}/>')
    if kind != "level":
        parts.append(f'<path d="{_SHAPES[style.symbol]}" fill="{style.colour}"/>')
    return f'<svg width="26" height="16" aria-hidden="true">{"".join(parts)}</svg>'


def _hash_source(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"
