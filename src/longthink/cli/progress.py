"""Progress on standard error: a live bar on a terminal, occasional plain lines elsewhere, and the library's log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from longthink.cli.terminal import err_console, is_terminal, note
from longthink.cli.text import visible

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

FIRST_LINE_S = 2.0  # seconds before the first plain line; shorter work prints none
LINE_EVERY_S = 10.0  # seconds between further plain lines


class _Notes(logging.Handler):
    """Writes messages of the library as lines of the command line, above a live bar."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


_NOTES = _Notes(logging.WARNING)


def show_log() -> None:
    """Show what the library logs, such as that it compiles for a minute."""
    logging.getLogger("longthink").addHandler(_NOTES)


class _LineTask:
    """Plain lines, few enough for a log file."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._next = time.monotonic() + FIRST_LINE_S
        # Work that cannot report progress (loading a model) still shows that it has started.
        self._opening = threading.Timer(FIRST_LINE_S, note, [f"{title} ..."])
        self._opening.daemon = True
        self._opening.start()

    def advance_to(self, done: int, detail: str = "") -> None:
        self._opening.cancel()
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LINE_EVERY_S
        of_total = f"/{self._total}" if self._total is not None else ""
        note(f"{self._title}: {done}{of_total} {self._unit}{', ' + detail if detail else ''}")

    def hide(self) -> None:
        self._opening.cancel()
        self._next = float("inf")


class _BarTask:
    def __init__(self, display: Progress, row: TaskID) -> None:
        self._display, self._row = display, row

    def advance_to(self, done: int, detail: str = "") -> None:
        self._display.update(self._row, completed=done, detail=visible(detail))

    def hide(self) -> None:
        self._display.stop()


Task = _LineTask | _BarTask
"""Work whose progress is shown; `hide` removes the display early, before something else is written."""


@contextmanager
def progress(title: str, *, total: int | None = None, unit: str = "") -> Iterator[Task]:
    """Show the progress of a piece of work, of ``total`` units if known, while the ``with`` block runs."""
    if not is_terminal(sys.stderr):
        task = _LineTask(title, total, unit)
        try:
            yield task
        finally:
            task.hide()
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    counted = [BarColumn(bar_width=30), TextColumn("{task.completed:.0f}/{task.total:.0f} " + unit)]
    display = Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False),
        *(counted if total is not None else []), TextColumn("{task.fields[detail]}", markup=False),
        TimeElapsedColumn(), console=err_console(), transient=True,
    )  # fmt: skip
    with display:
        yield _BarTask(display, display.add_task(visible(title), total=total, detail=""))
