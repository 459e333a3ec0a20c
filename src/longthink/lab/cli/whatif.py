"""``longthink what-if``: policies on recorded traces, without decoding again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from longthink.cli.options import Switch, policy_list
from longthink.cli.progress import progress
from longthink.cli.terminal import visible, write_json, write_table, write_text
from longthink.lab.cli.analyze_options import RULES, RuleOptions
from longthink.lab.cli.eval import budget_text

if TYPE_CHECKING:
    from longthink.config import Budget
    from longthink.lab.analyze import Outcome, Rules, Trace
    from longthink.lab.analyze.correlation import Correlation
    from longthink.lab.analyze.summary import Mean
    from longthink.lab.results.store import ResultStore
    from longthink.policies import Policy


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WhatIfOptions:
    """Options of ``longthink what-if``."""

    policies: str = "recency,h2o:pin_prompt=True,raas:score=exact,random"
    """Policies, separated by commas; options after colons. Those that look at keys need a trace --with-vectors."""

    budgets: str | None = None
    """Tokens kept per layer, prompt included, separated by commas."""

    decode_budgets: str | None = None
    """Tokens kept per layer on top of the prompt, separated by commas."""

    rules: RuleOptions = RULES

    answers: Path | None = None
    """Results of "longthink eval" on the same problems, policies and budgets: say how far what was kept, now and in
    earlier replays, goes with right answers."""

    no_clairvoyant: Switch = False
    """Leave out Belady's rule and the optimum."""

    json: Switch = False
    """Print one JSON document instead of the table."""

    @property
    def sizes(self) -> list[Budget]:
        """The budgets given."""
        return budget_list(self.budgets, self.decode_budgets)


_DEFAULTS = WhatIfOptions()
_WORDS = {"recall": "recall", "lookups": "look-ups", "regrets": "regret"}


def what_if(traces: Path, /, *, options: WhatIfOptions = _DEFAULTS) -> int:
    """Replay policies over recorded traces: what would they have kept of what the model read?

    Recall is the share of the dense attention that falls on kept tokens; look-ups are the steps in which a head reads
    something far away for certain; a regret is a token that was evicted and used afterwards. The results are also
    kept beside the traces, for "longthink report".

    Parameters
    ----------
    traces
        Folder that "longthink trace" wrote.
    """
    from longthink.lab.analyze import TraceStore
    from longthink.lab.analyze.correlation import correlate
    from longthink.lab.analyze.replays import load_replays, save_replays
    from longthink.lab.analyze.summary import means
    from longthink.lab.results.store import ResultStore

    policies, budgets = policy_list(options.policies), options.sizes
    answers = None if options.answers is None else ResultStore(options.answers.expanduser(), create=False)
    found = replay(traces, policies, budgets, options.rules, clairvoyant=not options.no_clairvoyant)
    store = TraceStore(traces.expanduser())
    save_replays(store, found, options.rules)
    rows = means(found)
    correlations = []
    if answers is not None:  # with what was replayed before, by the same rules
        correlations = correlate(load_replays(store)[0], _right_answers(answers, store.settings["model"]))
    if options.json:
        tables = {
            "rows": [asdict(row) for row in rows],
            "correlations": [asdict(one) for one in correlations],
        }
        write_json({"rules": asdict(options.rules)} | tables)
    else:
        print_means(rows)
        _print_correlations(correlations)
    return 0


def _right_answers(store: ResultStore, model: str) -> dict[Any, float]:
    """Share of right answers of each task, problem, policy and budget."""
    rows = store.query(
        "SELECT task, problem, policy, budget, decode_budget, avg(correct::INT) AS share FROM samples "
        "WHERE model = ? GROUP BY ALL",
        (model,),
    )
    return {tuple(row.values())[:-1]: row["share"] for row in rows}


def _print_correlations(correlations: Sequence[Correlation]) -> None:
    if not correlations:
        return
    first = correlations[0]
    over = f"{first.cells} policies at budgets, {first.problems} problems"
    if all(isnan(one.rho) for one in correlations):
        write_text(f"No rank correlation: all of {over}, are right equally often.\n")
        return
    for name, parts in (
        (f"Rank correlation with right answers over {over}",
         [f"{one.rho:.2f} ({one.low:.2f} to {one.high:.2f})" for one in correlations]),
        ("A right answer has more than a wrong one in so many pairs", [f"{one.ahead:.0%}" for one in correlations]),
    ):  # fmt: skip
        said = [f"{_WORDS[one.measure]} {part}" for one, part in zip(correlations, parts, strict=True)]
        write_text(f"{name}: {', '.join(said)}.\n")


def budget_list(budgets: str | None, decode_budgets: str | None) -> list[Budget]:
    """Return the budgets of two lists of numbers.

    Raises
    ------
    ValueError
        If there is none, or one is no number.
    """
    from longthink.config import Budget

    def numbers(name: str, text: str | None) -> list[int]:
        try:
            return [int(part) for part in (text or "").split(",") if part.strip()]
        except ValueError:
            raise ValueError(f"{name}={text!r} must be numbers separated by commas") from None

    found = [Budget(budget=number) for number in numbers("budgets", budgets)]
    found += [Budget(decode_budget=number) for number in numbers("decode_budgets", decode_budgets)]
    if not found:
        raise ValueError("no budget is given: name at least one with --budgets or --decode-budgets")
    return found


def replay(
    folder: Path,
    policies: Sequence[Policy],
    budgets: Sequence[Budget],
    rules: Rules,
    *,
    clairvoyant: bool = True,
) -> list[Outcome]:
    """Replay policies at budgets over all traces of a folder, with progress."""
    from longthink.lab.analyze import TraceStore
    from longthink.lab.analyze import what_if as run
    from longthink.lab.analyze.whatif import check_replayable

    traces = TraceStore(folder.expanduser()).traces()
    for policy in policies:
        check_replayable(policy, traces[0])
    steps = sum(len(one.header.steps) for one in traces)
    found, before = [], 0
    with progress("replaying", total=steps, unit="steps") as task:
        for one in traces:

            def on_step(count: int, one: Trace = one, before: int = before) -> None:
                task.advance_to(before + count, f"{one.header.task} {one.header.problem}")

            found += run(one, policies, budgets, rules=rules, clairvoyant=clairvoyant, on_step=on_step)
            before += len(one.header.steps)
    return found


def print_means(rows: Sequence[Mean]) -> None:
    """Print a table of means over problems."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from longthink.lab.analyze.whatif import BELADY, OPTIMUM

    caption = (
        "means over problems; recall: dense attention kept; worst: of the head that keeps least; look-ups: in steps "
        "that read something far away; regret: evicted tokens that were used later"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column("policy", min_width=14, overflow="fold")
    for heading in ("budget", "n", "recall", "worst", "look-ups", "evicted", "regret", "no room"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        # Only of a policy does the name say its pages.
        pages = (
            f" (pages of {row.page_size})" if row.policy in (BELADY, OPTIMUM) and row.page_size > 1 else ""
        )
        table.add_row(Text(visible(row.policy + pages)), *_cells(row))
    write_table(table)


def _cells(row: Mean) -> list[str]:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    values: list[Any] = [budget_text(row.budget, row.decode_budget), str(row.problems)]
    values += [share(value) for value in (row.recall, row.worst, row.lookups)]
    regrets = "-" if row.regrets is None else f"{row.regrets:.1f}"
    return [*values, "-" if row.evictions is None else f"{row.evictions:.0f}", regrets, str(row.no_room)]
