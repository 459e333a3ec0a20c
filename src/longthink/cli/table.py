"""One description of a table, shown on a terminal, saved as CSV and Markdown, and rendered as HTML by reports."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longthink.cli.text import for_markdown, size_text, visible
from longthink.files import write_text

if TYPE_CHECKING:
    from rich.table import Table as RichTable

KINDS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "words": str,
    "code": str,
    "formatted": str,
    "count": lambda value: f"{value:,}",
    "percent": lambda value: f"{value:.1%}",
    "points": lambda value: f"{100 * value:+.1f}",
    "p": lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",
    "number": lambda value: f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}",
    "ms": lambda value: f"{value:.1f}",
    "mib": lambda value: f"{value / 2**20:,.2f}",
    "size": size_text,
}
"""How the values of a column are written. ``text``, ``words`` and ``code`` are aligned left, all others right. A
column of ``text`` with the same value in all rows moves to the note; ``code`` and numbers never wrap; ``formatted``
takes finished numbers."""

_MIN_TEXT_WIDTH = 14  # characters below which a terminal does not squeeze a column of text


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns of one kind each, and rows of raw values."""

    columns: dict[str, str]  # kind of each column, a key of :data:`KINDS`, by its heading
    rows: list[list[Any]]  # a value for each column; None is an empty cell
    name: str = ""  # file name without its ending, and the element's id in HTML
    title: str = ""
    note: str = ""  # above the table, on a terminal below it
    marked: frozenset[int] = frozenset()  # indices of rows to highlight

    def shown(self) -> tuple[dict[str, str], list[list[str]], str]:
        """Columns, cells and note as they are displayed, without empty columns."""
        columns, places, same = {}, [], []
        for place, (heading, kind) in enumerate(self.columns.items()):
            values = {row[place] for row in self.rows}
            if values == {None}:
                continue
            if kind == "text" and len(values) == 1 < len(self.rows):
                same += [f"{heading} {value}" for value in values if value]
            else:
                columns[heading] = kind
                places.append(place)
        kinds = list(self.columns.values())
        cells = [
            ["" if row[place] is None else KINDS[kinds[place]](row[place]) for place in places]
            for row in self.rows
        ]
        note = f"{self.note} In all rows: {'; '.join(same)}." if same else self.note
        return columns, cells, note.strip()

    def rich(self) -> RichTable:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        columns, rows, note = self.shown()
        grid = RichTable(
            box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left"
        )
        grid.title, grid.caption = (Text(visible(text)) if text else None for text in (self.title, note))
        for place, (heading, kind) in enumerate(columns.items()):
            if kind in ("text", "words"):
                texts = [heading, *(row[place] for row in rows)]
                widest = max(len(line) for text in texts for line in text.splitlines() or [""])
                grid.add_column(visible(heading), overflow="fold", min_width=min(widest, _MIN_TEXT_WIDTH))
            else:
                grid.add_column(visible(heading), justify="left" if kind == "code" else "right", no_wrap=True)
        for i, row in enumerate(rows):
            style = "bold red" if i in self.marked else None
            grid.add_row(*(Text(visible(cell)) for cell in row), style=style)
        return grid

    def csv(self) -> str:
        """Return the table with raw values (memory in bytes), a header first."""
        text = io.StringIO()
        # A lone carriage return would not be quoted otherwise, and ends a row for most readers.
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(heading.replace("MiB", "bytes").replace(" ", "_") for heading in self.columns)
        writer.writerows(self.rows)
        return text.getvalue()

    def markdown(self) -> str:
        columns, rows, note = self.shown()
        rules = ["---" if kind in ("text", "words", "code") else "---:" for kind in columns.values()]
        lines = [columns, rules, *([for_markdown(cell) for cell in row] for row in rows)]
        head = [f"## {self.title}", "", for_markdown(note), ""]
        return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines), ""])

    def save(self, folder: Path) -> None:
        """Write NAME.csv and NAME.md into a folder, which is created if needed."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{self.name}.csv", self.csv())
        write_text(folder / f"{self.name}.md", self.markdown())
