"""Where the command line writes: results on standard output, everything else on standard error.

Foreign text goes through :func:`longthink.cli.text.visible` first.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from longthink.cli.table import Table
from longthink.cli.text import one_line, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column
    from rich.table import Table as RichTable


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def shares_place(one: TextIO, other: TextIO) -> bool:
    """Return whether two streams end up in the same place: a terminal, or one and the same file or pipe."""
    if is_terminal(one):
        return True
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except (OSError, ValueError):
        return False


def out_console() -> Console:
    from rich.console import Console

    class PipeConsole(Console):
        # Rich would end the process here; a closed pipe is handled in one place, for all commands.
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return PipeConsole(file=sys.stdout, highlight=False)


def err_console() -> Console:
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def write_table(table: Table) -> None:
    """Print a table; where the terminal is too narrow, print each cell on a line of its own.

    Rich would cut values in two there, and leave out whole columns.
    """
    from rich.text import Text

    grid = table.rich()
    console = out_console()
    if _table_width(console, grid) <= console.width:
        console.print(grid)
        return
    for title in filter(None, (grid.title, grid.caption)):
        console.print(title)
    for cells in zip(*(column.cells for column in grid.columns), strict=True):
        for column, cell in zip(grid.columns, cells, strict=True):
            console.print(Text(f"{column.header}: ") + cell, overflow="fold")
        console.print()


def _table_width(console: Console, table: RichTable) -> int:
    """Width, in characters, at which nothing of a table is cut."""
    from rich.measure import Measurement

    def width(column: Column) -> int:
        sizes = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
        widest = max(size.maximum if column.no_wrap else size.minimum for size in sizes)
        return max(widest if column.overflow != "fold" else 1, column.min_width or 0)

    wide = console.options.update(max_width=10_000)
    _, right, _, left = table.padding
    # Between two columns there is a line, and one at each end.
    return sum(width(column) + left + right + 1 for column in table.columns) + 1


def note(message: str) -> None:
    """Write one line for the user to standard error, if it can still be written to."""
    with suppress(OSError):
        print(one_line(message), file=sys.stderr, flush=True)


def write_text(text: str) -> None:
    """Write model text to standard output at once: made safe on a terminal, unchanged into a file or a pipe."""
    sys.stdout.write(visible(text) if is_terminal(sys.stdout) else text)
    sys.stdout.flush()


def write_json(document: object) -> None:
    """Write one JSON document to standard output (ASCII only, so that a terminal may show it too)."""
    import json

    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    sys.stdout.flush()
