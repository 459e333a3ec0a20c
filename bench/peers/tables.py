"""The tables of ``python -m bench.peers``, the same on a terminal and in a document."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from bench.peers.measure import Results, Timing
from bench.peers.plan import CONTROL, PeersPlan
from bench.peers.targets import Target, targets
from longthink.cli.table import Table


def make_tables(plan: PeersPlan, results: Results) -> list[Table]:
    """Return time by context for each model, batches, targets, and what is missing."""
    tables = [_times(model, results) for model in plan.models]
    tables.append(
        _grid(
            "batches", "Tokens per second, by batch size", [one for one in results.timings if one.batch],
            lambda one: one.case.rows, lambda one, ms: one.case.rows * 1000 / ms,
        )
    )  # fmt: skip
    tables.append(
        Table(
            name="targets",
            title="Targets",
            note="Ratios of times within a round, median over the rounds; under rounds the lowest and the highest.",
            columns=dict.fromkeys(
                ("target", "model", "wanted", "measured", "rounds", "met", "remark"), "text"
            ),
            rows=[_target_row(target) for target in targets(results, list(plan.models))],
        )
    )
    tables.append(
        Table(
            name="missing",
            title="Missing",
            note="Asked for, but not measured.",
            columns={"system": "text", "why": "text"},
            rows=[list(pair) for pair in results.missing.items()],
        )
    )
    return [table for table in tables if table.rows]


def _times(model: str, results: Results) -> Table:
    mine = [
        one for one in results.timings if one.model == model and not one.batch and one.case.system != CONTROL
    ]
    return _grid(
        f"time-{model}", f"{model}: milliseconds per token, after this many tokens", mine,
        lambda one: one.case.context, lambda one, ms: ms,
    )  # fmt: skip


def _grid(
    name: str,
    title: str,
    timings: list[Timing],
    column: Callable[[Timing], int],
    value: Callable[[Timing, float], float],
) -> Table:
    columns, rows = sorted({column(one) for one in timings}), []
    for label in dict.fromkeys(one.case.label for one in timings):
        # The first timing of a case is that of its own scene; others are there for a ratio.
        at = {column(one): _spread(one, value) for one in reversed(timings) if one.case.label == label}
        rows.append([label, *(at.get(each, "") for each in columns)])
    return Table(
        name=name,
        title=title,
        note="Median over the rounds, in brackets the quartiles.",
        columns={"system": "text"} | {f"{each:,}": "text" for each in columns},
        rows=rows,
    )


def _spread(one: Timing, value: Callable[[Timing, float], float]) -> str:
    quartiles = (one.row.ms_per_token_low or 0.0, one.row.ms_per_token_high or 0.0)
    low, high = sorted(value(one, ms) for ms in quartiles)
    return f"{value(one, median(one.ms)):.1f} ({low:.1f} to {high:.1f})"


def _target_row(target: Target) -> list[str]:
    def shown(value: float) -> str:
        return f"{value:.1%}" if target.percent else f"{value:.2f}"

    measured = ["missing", "", ""]
    if target.measured is not None and target.low is not None and target.high is not None:
        rounds = f"{shown(target.low)} to {shown(target.high)}"
        measured = [shown(target.measured), rounds, "yes" if target.met else "NO"]
    return [target.text, target.model, f"{target.sign} {shown(target.wanted)}", *measured, target.remark]
