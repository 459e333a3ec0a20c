"""The page: one HTML file with everything it shows, rendered from ``templates/``."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from longthink.cli.table import Table
from longthink.cli.text import visible
from longthink.files import write_text
from longthink.lab.report.figures import Figure
from longthink.lab.report.plots import line_id, panel_svg, save_figures, swatch_svg

if TYPE_CHECKING:
    from jinja2 import Environment

Content = TypeVar("Content")


@dataclass(kw_only=True)
class Page:
    """Collects blocks by section and renders them as one HTML file."""

    title: str
    summary: str
    sections: dict[str, list[tuple[str, tuple[Any, ...]]]] = field(default_factory=dict)
    """Blocks of each section: the name of a macro in ``templates/parts.html``, and its arguments."""
    data: dict[str, Any] = field(default_factory=dict)
    """JSON documents for scripts, by the id of the element that holds them."""
    parts: tuple[str, ...] = ("page",)  # scripts and style sheets that the page needs

    def add(self, section: str, block: str, *content: Any) -> None:
        self.sections.setdefault(section, []).append((block, content))

    def html(self) -> str:
        folder = files("longthink.lab.report") / "templates"
        scripts = [(folder / f"{name}.js").read_text(encoding="utf-8") for name in self.parts]
        style = "".join((folder / f"{name}.css").read_text(encoding="utf-8") for name in self.parts)
        data = {"hover": _hover_texts(self._contents(Figure))} | self.data
        template = environment().get_template("page.html")
        return template.render(page=self, data=data, scripts=scripts, style=style)

    def save(self, path: Path) -> Path:
        """Write the page, and beside it its figures (PNG and PDF) and tables (CSV and Markdown)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figures(self._contents(Figure), path.parent / "figures")
        for table in self._contents(Table):
            table.save(path.parent / "tables")
        write_text(path, self.html())
        return path

    def _contents(self, kind: type[Content]) -> list[Content]:
        blocks = (block for blocks in self.sections.values() for block in blocks)
        return [one for _, content in blocks for one in content if isinstance(one, kind)]


def _hover_texts(figures: list[Figure]) -> dict[str, list[str]]:
    return {
        line_id(figure, i, j): [visible(text) for text in line.hover]
        for figure in figures
        for i, panel in enumerate(figure.panels)
        for j, line in enumerate(panel.lines)
    }


@cache
def environment() -> Environment:
    """Return the templates' environment: all values are escaped, with control characters made visible."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("longthink.lab.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_finalize,
    )  # fmt: skip
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    made.filters["flat"] = _flat
    made.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    made.globals |= {"panel_svg": panel_svg, "swatch_svg": swatch_svg}
    return made


def _finalize(value: Any) -> Any:
    """Make control characters visible in all that is not HTML already."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _flat(text: str) -> str:
    """Return a JSON object as ``name value`` pairs, anything else unchanged."""
    try:
        return ", ".join(f"{name} {value}" for name, value in json.loads(text).items())
    except (ValueError, AttributeError):
        return text
