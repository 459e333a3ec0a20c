"""``longthink advise``: which policy, and how small a budget, from a few traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from longthink.cli.models import load_model
from longthink.cli.options import Switch, policy_list
from longthink.cli.terminal import note, one_line, size_text, visible, write_json, write_table, write_text
from longthink.lab.cli.analyze_options import RULES, RuleOptions, TraceOptions
from longthink.lab.cli.eval import budget_text
from longthink.lab.cli.trace import record_traces
from longthink.lab.cli.whatif import budget_list, replay

if TYPE_CHECKING:
    from longthink.lab.analyze.advice import Advice, Shape
    from longthink.lab.analyze.store import Header
    from longthink.models import Loaded

POLICIES = "recency,h2o:pin_prompt=True,raas:score=exact"
"""What is compared when nothing is said; with vectors also `WITH_VECTORS`."""
WITH_VECTORS = "milestone,raas"
DENSE = "dense"
_STEPS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Budgets that are tried when none is given: shares of the longest chain of thought, in whole pages of 16."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class AdviseOptions(TraceOptions):
    """Options of ``longthink advise``."""

    policies: str | None = None
    """Policies to compare [default: recency, h2o, raas by weights; with --with-vectors also milestone and raas]."""

    decode_budgets: str | None = None
    """Tokens on top of the prompt to try, separated by commas [default: shares of the longest chain of thought]."""

    rules: RuleOptions = RULES

    loss: float = 0.02
    """Share of what Dense reads that may be lost."""

    measure: Literal["lookups", "recall"] = "lookups"
    """What must be kept: the attention of look-ups (steps that read something far away), or all attention."""

    gpu_memory: float = 24.0
    """Memory for weights and caches, in GiB."""

    accuracy: Switch = False
    """Also decode the same problems with Dense and with each policy at rising budgets, and list only budgets at which
    it is right as often as Dense within the loss."""

    json: Switch = False
    """Print one JSON document instead of the table."""


_DEFAULTS = AdviseOptions()


def advise(*, options: AdviseOptions = _DEFAULTS) -> int:
    """Say which policy and how small a budget keep what a model reads, and what memory that saves.

    Records a few problems (those that --out holds already are not recorded again), replays policies at rising
    budgets, and lists what stays within the loss, the smallest first.
    """
    from longthink.lab.analyze.advice import advise as rank
    from longthink.lab.analyze.summary import means

    loaded = load_model(options)
    store = record_traces(options, loaded)
    headers = [trace.header for trace in store.traces()]
    names = options.policies or ",".join([POLICIES, *([WITH_VECTORS] if options.with_vectors else [])])
    budgets = budget_list(None, options.decode_budgets or _budgets(headers))
    rows = means(replay(options.out, policy_list(names), budgets, options.rules, clairvoyant=False))
    shape = _shape(loaded, headers)
    found = rank(
        rows, shape, loss=options.loss, measure=options.measure, memory=int(options.gpu_memory * 2**30)
    )
    graded: dict[str, dict[str, Any]] = {}
    if options.accuracy and found:
        graded = _grade_all(found, options)
        found = [one for one in found if _is_right(graded, one, options.loss)]
    best = _best_of_each(found)
    if options.json:
        advice = [asdict(one) | {"accuracy": graded.get(_key(one))} for one in best]
        plain = asdict(shape) | {"dtype": str(shape.dtype).removeprefix("torch.")}
        write_json(
            {
                "shape": plain,
                "advice": advice,
                "accuracy": graded or None,
                "rows": [asdict(row) for row in rows],
            }
        )
        return 0
    _print(best, graded, options)
    return 0


def _budgets(headers: Sequence[Header]) -> str:
    longest = max(len(header.steps) for header in headers)
    return ",".join(dict.fromkeys(str(max(32, -(-int(longest * share) // 16) * 16)) for share in _STEPS))


def _shape(loaded: Loaded, headers: Sequence[Header]) -> Shape:
    from longthink.lab.analyze.advice import Shape

    first = headers[0]
    return Shape(
        layers=first.layers,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        dtype=loaded.model.dtype,
        weights=sum(p.nbytes for p in loaded.model.parameters()),
        prompt=round(sum(header.prompt_tokens for header in headers) / len(headers)),
        tokens=max(len(header.token_ids) for header in headers),
    )


def _best_of_each(found: Sequence[Advice]) -> list[Advice]:
    """The smallest budget of each policy; they come in order."""
    best: dict[str, Advice] = {}
    for one in found:
        best.setdefault(one.row.policy, one)
    return list(best.values())


def _key(one: Advice) -> str:
    return f"{one.row.policy} {one.row.decode_budget}"


def _grade_all(found: Sequence[Advice], options: AdviseOptions) -> dict[str, dict[str, Any]]:
    """Right answers of Dense, and of each policy from its smallest budget on until one loses no more than allowed."""
    graded = {DENSE: _grade(None, options)}
    done = set()
    for one in found:
        if one.row.policy not in done:
            graded[_key(one)] = _grade(one, options)
            if _is_right(graded, one, options.loss):
                done.add(one.row.policy)
    return graded


def _is_right(graded: dict[str, dict[str, Any]], one: Advice, loss: float) -> bool:
    """Whether an advice was graded, and is right as often as Dense within the loss."""
    mine = graded.get(_key(one))
    return mine is not None and mine["share"] >= graded[DENSE]["share"] - loss


def _grade(one: Advice | None, options: AdviseOptions) -> dict[str, Any]:
    """Right answers of an advice, or of Dense, on the problems that were recorded."""
    from longthink.lab.evaluate.plan import Plan
    from longthink.lab.evaluate.summary import summarize
    from longthink.lab.evaluate.sweep import Sweep, run_sweep
    from longthink.lab.results.statistics import wilson
    from longthink.lab.results.store import ResultStore

    out = options.out.expanduser()
    store = ResultStore(out.with_name(f"{out.name}-answers"))
    bounded: dict[str, Any] = {}
    if one is not None:
        assert one.row.decode_budget is not None
        bounded = {"policies": (one.row.policy,), "decode_budgets": (one.row.decode_budget,)}
    plan = Plan(
        model=options.model, device=options.device, dtype=options.dtype, count=options.count, seed=options.seed,
        tasks=tuple(name.strip() for name in options.tasks.split(",")), data=tuple(map(str, options.data or ())),
        max_new_tokens=options.max_new_tokens, **bounded,
    )  # fmt: skip
    sweep = Sweep(plan, plan.load_tasks(), store)
    run_sweep(sweep)
    rows = summarize(store, sweep.configs)
    problems = sum(row.problems for row in rows)
    right = sum(row.accuracy * row.problems for row in rows)
    low, high = wilson(right, problems)
    found = {"right": right, "problems": problems, "share": right / problems, "low": low, "high": high}
    note(f"{DENSE if one is None else _key(one)}: {_right(found)} right")
    return found


def _print(best: Sequence[Advice], graded: dict[str, dict[str, Any]], options: AdviseOptions) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not best:
        also = " and is right as often as Dense within the loss" if options.accuracy else ""
        write_text(
            f"No policy keeps {1 - options.loss:.1%} of {options.measure}{also} at any of the budgets: raise --loss, "
            "or name larger --decode-budgets\n"
        )
        return
    first = best[0]
    headings = ["look-ups", "recall", "a request", "requests"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("policy", min_width=14, overflow="fold")
    for heading in ("budget", *headings, *(["right"] if graded else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in best:
        row = one.row
        table.add_row(
            Text(visible(row.policy)), budget_text(row.budget, row.decode_budget), f"{row.lookups:.1%}",
            f"{row.recall:.1%}", size_text(one.bytes), f"{one.requests:,}",
            *([_right(graded[_key(one)])] if graded else []),
        )  # fmt: skip
    write_text(
        one_line(
            f"Smallest: {first.row.policy} with --decode-budget {first.row.decode_budget} keeps {first.kept:.1%} of "
            f"what Dense reads ({options.measure}) in {size_text(first.bytes)} a request instead of "
            f"{size_text(first.dense_kv_bytes)}: {first.requests:,} requests in {options.gpu_memory:g} GiB beside "
            f"the weights instead of {first.dense_requests:,}."
        )
        + "\n"
    )
    write_table(table)
    if graded:
        write_text(f"Dense: {_right(graded[DENSE])} right.\n")


def _right(found: dict[str, Any]) -> str:
    return f"{found['right']:g}/{found['problems']} ({100 * found['low']:.0f}-{found['high']:.0%})"
