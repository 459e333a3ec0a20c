"""The tables of ``longthink bench peers``, the same on a terminal and in a document."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from longthink.cli.terminal import out_console, visible, write_table
from longthink.lab.bench.peers.measure import Found, Timed
from longthink.lab.bench.peers.plan import CONTROL, PeersPlan
from longthink.lab.bench.peers.targets import Target, targets
from longthink.lab.report.tables import Table

_SPREAD = "Median over the rounds, in brackets the quartiles."


def make_tables(plan: PeersPlan, found: Found) -> list[Table]:
    """Return what was measured: time by context for each model, batches, targets, and what is missing."""
    made = [_times(model, found) for model in plan.models]
    made += [_batches(found), _targets(plan, found)]
    if found.missing:
        made.append(
            Table(
                name="missing",
                title="Missing",
                note="Asked for, and not measured.",
                columns={"system": "text", "why": "text"},
                rows=[list(pair) for pair in found.missing.items()],
            )
        )
    return [table for table in made if table.rows]


def print_table(table: Table) -> None:
    """Print a table on standard output."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    columns, rows, note = table.shown()
    grid = Grid(box=box.SIMPLE_HEAD)
    for name, kind in columns.items():
        grid.add_column(visible(name), justify="left" if kind == "text" else "right")
    for row in rows:
        grid.add_row(*(Text(visible(cell)) for cell in row))
    out_console().print(f"{table.title}. {visible(note)}", markup=False)
    write_table(grid)


def _times(model: str, found: Found) -> Table:
    mine = [
        one for one in found.timed if one.model == model and not one.batch and one.place.system != CONTROL
    ]
    contexts = sorted({one.place.context for one in mine})
    return _grid(
        f"time-{model}", f"{model}: milliseconds per token, after this many tokens", mine, contexts,
        lambda one: one.place.context, lambda one: _spread(one, lambda ms: ms),
    )  # fmt: skip


def _batches(found: Found) -> Table:
    mine = [one for one in found.timed if one.batch]
    rows = sorted({one.place.rows for one in mine})
    return _grid(
        "batches", "Tokens per second, for this many rows side by side", mine, rows,
        lambda one: one.place.rows, lambda one: _spread(one, lambda ms: one.place.rows * 1000 / ms),
    )  # fmt: skip


def _grid(
    name: str,
    title: str,
    timed: list[Timed],
    places: list[int],
    place: Callable[[Timed], int],
    cell: Callable[[Timed], str],
) -> Table:
    rows = []
    for label in dict.fromkeys(one.place.label for one in timed):
        # The first of a place is that of the scene about it; another scene may have it for a ratio.
        at = {place(one): cell(one) for one in reversed(timed) if one.place.label == label}
        rows.append([label, *(at.get(each, "") for each in places)])
    columns = {"system": "text"} | {f"{each:,}": "text" for each in places}
    return Table(name=name, title=title, note=_SPREAD, columns=columns, rows=rows)


def _spread(one: Timed, of: Callable[[float], float]) -> str:
    ends = sorted(of(ms) for ms in (one.row.ms_per_token_low or 0.0, one.row.ms_per_token_high or 0.0))
    return f"{of(median(one.ms)):.1f} ({ends[0]:.1f} to {ends[1]:.1f})"


def _targets(plan: PeersPlan, found: Found) -> Table:
    columns = dict.fromkeys(("target", "model", "wanted", "measured", "rounds", "met", "remark"), "text")
    return Table(
        name="targets",
        title="Targets",
        note="Ratios of times within a round, median over the rounds; under rounds the lowest and the highest.",
        columns=columns,
        rows=[_target_row(target) for target in targets(found, list(plan.models))],
    )


def _target_row(target: Target) -> list[str]:
    def shown(value: float) -> str:
        return f"{value:.1%}" if target.percent else f"{value:.2f}"

    wanted = f"{target.sign} {shown(target.wanted)}"
    if target.measured is None or target.low is None or target.high is None:
        return [target.text, target.model, wanted, "missing", "", "", target.remark]
    return [
        target.text,
        target.model,
        wanted,
        shown(target.measured),
        f"{shown(target.low)} to {shown(target.high)}",
        "yes" if target.met else "NO",
        target.remark,
    ]
