"""How far a sweep is: a live table on a terminal, now and then a line anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from longthink.cli.progress import FIRST_LINE_S, LINE_EVERY_S
from longthink.cli.terminal import err_console, is_terminal, note, visible
from longthink.lab.cli.eval import budget_text

if TYPE_CHECKING:
    from rich.table import Table

    from longthink.lab.evaluate.sweep import Sweep, Tally

MOST_LINES = 12
"""Configurations shown at the same time: those under way first."""


@contextmanager
def watching(sweep: Sweep) -> Iterator[None]:
    """Show the progress of a sweep while the ``with`` block runs."""
    started = time.monotonic()
    if not is_terminal(sys.stderr):
        next_line = started + FIRST_LINE_S

        def tell(sweep: Sweep) -> None:
            nonlocal next_line
            if time.monotonic() >= next_line:
                next_line = time.monotonic() + LINE_EVERY_S
                note(summary_line(sweep, time.monotonic() - started))

        sweep.report = tell
        yield
        return
    from rich.live import Live
    from rich.text import Text

    console = err_console()
    console.print(Text(visible(f"loading {sweep.plan.model}")))
    # `say` writes above the live table, not into it.
    with Live(console=console, transient=True, refresh_per_second=4) as live:
        sweep.say = lambda line: console.print(Text(visible(line)))
        sweep.report = lambda sweep: live.update(_table(sweep, time.monotonic() - started))
        yield


def summary_line(sweep: Sweep, seconds: float) -> str:
    """Return done, left, accuracy and time to go as one line."""
    total = sum(tally.total for tally in sweep.tallies.values())
    left = sum(tally.left for tally in sweep.tallies.values())
    made = sum(tally.made for tally in sweep.tallies.values())
    right = sum(tally.right for tally in sweep.tallies.values())
    parts = [f"{total - left}/{total} samples"]
    if made:
        parts += [f"{right / made:.0%} of {made} new ones right", f"{_clock(left * seconds / made)} to go"]
    return ", ".join(parts)


def _table(sweep: Sweep, seconds: float) -> Table:
    """One line for each policy and budget under way, all tasks together."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from longthink.lab.evaluate.sweep import Tally

    lanes: dict[tuple[str, str], Tally] = {}
    for cell, tally in sweep.tallies.items():
        key = cell.policy, budget_text(cell.lane.budget, cell.lane.decode_budget)
        sum_ = lanes.setdefault(key, Tally(total=0))
        for name in ("total", "stored", "made", "right"):
            setattr(sum_, name, getattr(sum_, name) + getattr(tally, name))
    table = Table(box=box.SIMPLE_HEAD, caption=summary_line(sweep, seconds), caption_justify="left")
    for heading in ("policy", "budget", "done", "right so far"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for (policy, budget), tally in sorted(lanes.items(), key=lambda item: _urgency(item[1]))[:MOST_LINES]:
        share = f"{tally.right / tally.made:.0%}" if tally.made else ""
        table.add_row(Text(visible(policy)), budget, f"{tally.total - tally.left}/{tally.total}", share)
    return table


def _urgency(tally: Tally) -> int:
    """Under way first, then what waits, then what is done."""
    if tally.left == 0:
        return 2
    return 0 if tally.made else 1


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
