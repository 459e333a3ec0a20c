"""Where the command line writes: results on standard output, everything else on standard error.

Text that comes from a model, a file name or an error message is foreign: on a terminal its control characters could
move the cursor, retitle the window or fake a prompt, so they are made visible first (:func:`visible`).
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table

# C0 and C1 controls and DEL; then the bidirectional overrides and isolates, which can show text in another order than
# it is stored. Newline and tab are harmless and stay.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""Return ``text`` with every control character replaced by a visible stand-in.

    Newline and tab stay. C0 controls become their Unicode picture (escape becomes ``␛``), the others an escape
    such as ``\x9b``.
    """
    return _UNSAFE.sub(_picture, text)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"


def one_line(text: str) -> str:
    """Return ``text`` as a single line that is safe to write to a terminal."""
    return visible(" ".join(text.split()))


def is_terminal(stream: TextIO | None) -> bool:
    """Say whether ``stream`` is open and writes to a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def shares_place(one: TextIO, other: TextIO) -> bool:
    """Say whether two streams end up in the same place: a terminal, or one and the same file or pipe."""
    if is_terminal(one):
        return True
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except (OSError, ValueError):
        return False


def out_console() -> Console:
    """Return a rich console on the current standard output."""
    from rich.console import Console

    class PipeConsole(Console):
        # Rich would end the process here; a closed pipe is handled in one place, for all commands.
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return PipeConsole(file=sys.stdout, highlight=False)


def err_console() -> Console:
    """Return a rich console on the current standard error."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def write_table(table: Table) -> None:
    """Print a table; where a terminal is too narrow, each row as a line for each cell.

    Rich would cut values in two there, and leave out whole columns.
    """
    from rich.text import Text

    console = out_console()
    if _table_width(console, table) <= console.width:
        console.print(table)
        return
    for title in filter(None, (table.title, table.caption)):
        console.print(title)
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        for column, cell in zip(table.columns, cells, strict=True):
            line = Text(f"{column.header}: ")
            console.print(
                line.append_text(cell if isinstance(cell, Text) else Text(str(cell))), overflow="fold"
            )
        console.print()


def _table_width(console: Console, table: Table) -> int:
    """Columns of a terminal that a table needs so that nothing is cut."""
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


def size_text(count: float) -> str:
    """Return a number of bytes as people read it: ``262 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    digits = 0 if unit == "B" or count >= 100 else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {unit}"
