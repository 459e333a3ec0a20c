"""The display of a sweep: its progress (a live table on a terminal, occasional lines elsewhere) and its results."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from longthink.cli.progress import FIRST_LINE_S, LINE_EVERY_S
from longthink.cli.terminal import err_console, is_terminal, note, write_table
from longthink.cli.text import visible
from longthink.lab.cli.tables import budget_text, policy_table

if TYPE_CHECKING:
    from rich.table import Table

    from longthink.lab.evaluate.summary import Summary
    from longthink.lab.evaluate.sweep import Sweep
    from longthink.lab.work.driver import Tally

MAX_ROWS = 12  # configurations shown at a time: those in progress first


@contextmanager
def watching(sweep: Sweep) -> Iterator[None]:
    started = time.monotonic()
    if not is_terminal(sys.stderr):
        next_line = started + FIRST_LINE_S

        def report(sweep: Sweep) -> None:
            nonlocal next_line
            if time.monotonic() >= next_line:
                next_line = time.monotonic() + LINE_EVERY_S
                note(progress_line(sweep.total, time.monotonic() - started))

        sweep.report = report
        yield
        return
    from rich.live import Live
    from rich.text import Text

    console = err_console()
    console.print(Text(visible(f"loading {sweep.plan.model}")))
    with Live(console=console, transient=True, refresh_per_second=4) as live:
        sweep.say = lambda line: console.print(Text(visible(line)))  # above the live table, not into it
        sweep.report = lambda sweep: live.update(_progress_table(sweep, time.monotonic() - started))
        yield


def progress_line(total: Tally, seconds: float) -> str:
    parts = [f"{total.total - total.left}/{total.total} samples"]
    if total.made:
        minutes, rest = divmod(int(total.left * seconds / total.made), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
        parts += [f"{total.right / total.made:.0%} of {total.made} new ones right", f"{clock} to go"]
    return ", ".join(parts)


def _progress_table(sweep: Sweep, seconds: float) -> Table:
    """One row per policy and budget, all tasks together."""
    tallies: dict[tuple[str, str], Tally] = {}
    for cell, tally in sweep.tallies.items():
        key = cell.policy, budget_text(cell.cache.budget, cell.cache.decode_budget)
        tallies[key] = tallies[key] + tally if key in tallies else tally
    # In progress first, then waiting, then complete.
    order = sorted(tallies.items(), key=lambda item: 2 if not item[1].left else 0 if item[1].made else 1)
    rows = [
        [*key, f"{one.total - one.left}/{one.total}", f"{one.right / one.made:.0%}" if one.made else ""]
        for key, one in order[:MAX_ROWS]
    ]
    caption = progress_line(sweep.total, seconds)
    return policy_table(("policy", "budget", "done", "right so far"), rows, caption=caption).rich()


def print_summaries(rows: Sequence[Summary]) -> None:
    """Print the results; columns that say nothing about any row are left out."""
    majority = ["" if row.majority is None else f"{row.majority:.1%}" for row in rows]
    shown = {"majority": majority, "no room": [str(row.no_room or "") for row in rows]}
    shown["NaN"] = [str(row.nan or "") for row in rows]
    shown = {heading: cells for heading, cells in shown.items() if any(cells)}
    table = [
        [row.policy, budget_text(row.budget, row.decode_budget), row.task, str(row.problems),
         f"{row.accuracy:.1%}", f"{100 * row.low:.0f}-{row.high:.0%}", f"{row.tokens:.0f}",
         f"{row.truncated / row.samples:.0%}", *(cells[i] for cells in shown.values())]
        for i, row in enumerate(rows)
    ]  # fmt: skip
    headings = ("policy", "budget", "task", "n", "right", "interval", "tokens", "cut", *shown)
    caption = "right: pass@1, with Wilson 95 % interval; cut: share of answers that hit the token limit"
    write_table(policy_table(headings, table, caption=caption))
