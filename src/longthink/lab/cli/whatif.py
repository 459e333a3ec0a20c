"""``longthink what-if``: policies on recorded traces, without decoding again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from longthink.cli.options import Switch, policy_list, words
from longthink.cli.progress import progress
from longthink.cli.terminal import write_json, write_table, write_text
from longthink.lab.cli.analyze_options import Classes, read_rules
from longthink.lab.cli.tables import budget_text, policy_table

if TYPE_CHECKING:
    from longthink.config import Budget
    from longthink.lab.analyze.correlation import Correlation
    from longthink.lab.analyze.replays import Mean, Replay
    from longthink.lab.analyze.rules import Rules
    from longthink.lab.analyze.store import Trace
    from longthink.lab.results.store import ResultStore
    from longthink.policies import Policy


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WhatIfOptions:
    policies: str = "recency,h2o:pin_prompt=True,raas:score=exact,random"
    """Policies, separated by commas. Those that look at keys need a trace recorded --with-vectors."""
    budgets: str | None = None
    """Tokens kept per layer, prompt included, separated by commas."""
    decode_budgets: str | None = None
    """Tokens kept per layer on top of the prompt, separated by commas."""
    classes: Classes = None
    answers: Path | None = None
    """Results of "longthink eval" with the same problems, policies and budgets: print how well what was kept, in this
    and earlier replays, predicts right answers."""
    no_clairvoyant: Switch = False
    """Leave out Belady's rule and the optimum."""
    json: Switch = False
    """Print one JSON document instead of the table."""


_DEFAULTS = WhatIfOptions()
_WORDS = {"recall": "recall", "lookups": "look-ups", "regrets": "regret"}


def what_if(traces: Path, /, *, options: WhatIfOptions = _DEFAULTS) -> int:
    """Replay policies over recorded traces: what would they have kept of what the model read?

    Recall is the share of the dense attention that falls on kept tokens; look-ups are steps in which a head reads a
    distant page with confidence; a regret is a token that was evicted and used afterwards. The results are also
    stored with the traces, for "longthink report".

    Parameters
    ----------
    traces
        Folder written by "longthink trace".
    """
    from longthink.lab.analyze.correlation import correlate
    from longthink.lab.analyze.replays import load_replays, means, save_replays
    from longthink.lab.analyze.store import TraceStore
    from longthink.lab.results.store import ResultStore

    policies, budgets = policy_list(options.policies), budget_list(options.budgets, options.decode_budgets)
    rules = read_rules(options.classes)
    answers = None if options.answers is None else ResultStore(options.answers.expanduser(), create=False)
    found = replay_all(traces, policies, budgets, rules, clairvoyant=not options.no_clairvoyant)
    store = TraceStore(traces.expanduser())
    save_replays(store, found, rules)
    rows, correlations = means(found), []
    if answers is not None:  # includes earlier replays with the same rules
        correlations = correlate(load_replays(store)[0], _right_answers(answers, store.settings["model"]))
    if options.json:
        tables = {"rows": [*map(asdict, rows)], "correlations": [*map(asdict, correlations)]}
        write_json({"rules": asdict(rules)} | tables)
    else:
        _print_means(rows)
        _print_correlations(correlations)
    return 0


def _right_answers(store: ResultStore, model: str) -> dict[Any, float]:
    shares = "SELECT task, problem, policy, budget, decode_budget, avg(correct::INT) AS share FROM samples"
    rows = store.query(f"{shares} WHERE model = ? GROUP BY ALL", (model,))
    return {tuple(row.values())[:-1]: row["share"] for row in rows}


def _print_correlations(correlations: Sequence[Correlation]) -> None:
    if not correlations:
        return
    first = correlations[0]
    over = f"{first.cells} policies at budgets, {first.problems} problems"
    if all(isnan(one.rho) for one in correlations):
        write_text(f"No rank correlation: all of {over}, are right equally often.\n")
        return
    for title, texts in (
        (f"Rank correlation with right answers over {over}",
         [f"{one.rho:.2f} ({one.low:.2f} to {one.high:.2f})" for one in correlations]),
        ("Pairs in which the right answer has more than the wrong one", [f"{one.ahead:.0%}" for one in correlations]),
    ):  # fmt: skip
        parts = [f"{_WORDS[one.measure]} {text}" for one, text in zip(correlations, texts, strict=True)]
        write_text(f"{title}: {', '.join(parts)}.\n")


def budget_list(budgets: str | None, decode_budgets: str | None) -> list[Budget]:
    from longthink.config import Budget

    def numbers(name: str, text: str | None) -> list[int]:
        try:
            return [int(word) for word in words(text or "")]
        except ValueError:
            raise ValueError(f"{name}={text!r} must be numbers separated by commas") from None

    found = [Budget(budget=number) for number in numbers("budgets", budgets)]
    found += [Budget(decode_budget=number) for number in numbers("decode_budgets", decode_budgets)]
    if not found:
        raise ValueError("no budget is given: name at least one with --budgets or --decode-budgets")
    return found


def replay_all(
    folder: Path, policies: Sequence[Policy], budgets: Sequence[Budget], rules: Rules, *, clairvoyant: bool
) -> list[Replay]:
    from longthink.lab.analyze.store import TraceStore
    from longthink.lab.analyze.whatif import check_replayable, what_if

    traces = TraceStore(folder.expanduser()).traces()
    for policy in policies:
        check_replayable(policy, traces[0])
    found, before = [], 0
    with progress("replaying", total=sum(len(one.header.steps) for one in traces), unit="steps") as task:
        for one in traces:

            def on_step(count: int, one: Trace = one, before: int = before) -> None:
                task.advance_to(before + count, f"{one.header.task} {one.header.problem}")

            found += what_if(one, policies, budgets, rules=rules, clairvoyant=clairvoyant, on_step=on_step)
            before += len(one.header.steps)
    return found


def _print_means(rows: Sequence[Mean]) -> None:
    from longthink.lab.analyze.replays import CLAIRVOYANT

    def cells(row: Mean) -> list[str]:
        # The others have their page size in their name.
        pages = f" (pages of {row.page_size})" if row.policy in CLAIRVOYANT and row.page_size > 1 else ""
        shares = ["-" if value is None else f"{value:.1%}" for value in (row.recall, row.worst, row.lookups)]
        evicted = "-" if row.evictions is None else f"{row.evictions:.0f}"
        regrets = "-" if row.regrets is None else f"{row.regrets:.1f}"
        budget = budget_text(row.budget, row.decode_budget)
        return [row.policy + pages, budget, str(row.problems), *shares, evicted, regrets, str(row.no_room)]

    headings = ("policy", "budget", "n", "recall", "worst", "look-ups", "evicted", "regret", "no room")
    caption = (
        "means over problems; recall: dense attention kept; worst: of the head that keeps least; look-ups: in steps "
        "that read something distant; regret: evicted tokens that were used later"
    )
    write_table(policy_table(headings, map(cells, rows), caption=caption))
