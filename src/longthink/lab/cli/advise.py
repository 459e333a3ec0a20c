"""``longthink advise``: which policy, and how small a budget, from a few traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Group, Parameter

from longthink.cli.models import load_model
from longthink.cli.options import Switch, policy_list
from longthink.cli.terminal import note, write_json, write_table, write_text
from longthink.cli.text import one_line, size_text
from longthink.lab.cli.analyze_options import Classes, Model, Problems, Recording, read_rules
from longthink.lab.cli.tables import budget_text, policy_table
from longthink.lab.cli.trace import record_traces
from longthink.lab.cli.whatif import budget_list, replay_all

if TYPE_CHECKING:
    from longthink.lab.analyze.advice import Advice
    from longthink.lab.analyze.store import Header

POLICIES = "recency,h2o:pin_prompt=True,raas:score=exact"  # with vectors also `VECTOR_POLICIES`
VECTOR_POLICIES = "milestone,raas"
DENSE = "dense"
_BUDGETS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)  # of the longest text


@Parameter(name="*", group=Group("Advice", sort_key=0))
@dataclass(frozen=True, kw_only=True)
class AdviseOptions:
    policies: str | None = None
    """Policies [default: recency, h2o, raas; with vectors also milestone]."""
    decode_budgets: str | None = None
    """Budgets on top of the prompt [default: shares of the longest text]."""
    loss: float = 0.02
    """Share of the measure that may be lost."""
    measure: Literal["lookups", "recall"] = "lookups"
    """Look-ups of distant pages, or all attention."""
    gpu_memory: float = 24.0
    """Memory for weights and caches (GiB)."""
    accuracy: Switch = False
    """Also decode, and list only budgets at which a policy is right as often as Dense within the loss."""
    classes: Classes = None
    json: Switch = False
    """Print one JSON document instead of the table."""


_DEFAULTS, _PROBLEMS, _MODEL, _RECORDING = AdviseOptions(), Problems(), Model(), Recording()


def advise(
    *, options: AdviseOptions = _DEFAULTS, problems: Problems = _PROBLEMS, model: Model = _MODEL,
    recording: Recording = _RECORDING,
) -> int:  # fmt: skip
    """Find the policy and the smallest budget that keep what a model reads.

    Records a few problems, unless --out has them already, and replays policies at rising budgets.
    """
    from longthink.lab.analyze.advice import advise as rank
    from longthink.lab.analyze.advice import shape_of
    from longthink.lab.analyze.replays import means

    rules, loaded = read_rules(options.classes), load_model(model)
    headers = [trace.header for trace in record_traces(problems, recording, loaded).traces()]
    names = options.policies or ",".join([POLICIES, *([VECTOR_POLICIES] if recording.with_vectors else [])])
    budgets = budget_list(None, options.decode_budgets or _budgets(headers))
    rows = means(replay_all(recording.out, policy_list(names), budgets, rules, clairvoyant=False))
    shape, memory = shape_of(loaded.model, headers), int(options.gpu_memory * 2**30)
    found = rank(rows, shape, loss=options.loss, measure=options.measure, memory=memory)
    graded: dict[str, dict[str, Any]] = {}
    if options.accuracy and found:
        graded = _grade_all(found, options.loss, problems, model, recording)
        found = [one for one in found if _is_right(graded, one, options.loss)]
    best: dict[str, Advice] = {}
    for one in found:  # the smallest budget comes first
        best.setdefault(one.row.policy, one)
    if options.json:
        advice = [asdict(one) | {"accuracy": graded.get(_key(one))} for one in best.values()]
        plain = asdict(shape) | {"dtype": str(shape.dtype).removeprefix("torch.")}
        replays = [asdict(row) for row in rows]
        write_json({"shape": plain, "advice": advice, "accuracy": graded or None, "rows": replays})
    else:
        _print(list(best.values()), graded, options)
    return 0


def _budgets(headers: Sequence[Header]) -> str:
    longest = max(len(header.steps) for header in headers)
    return ",".join(dict.fromkeys(str(max(32, -(-int(longest * share) // 16) * 16)) for share in _BUDGETS))


def _key(one: Advice) -> str:
    return f"{one.row.policy} {one.row.decode_budget}"


def _grade_all(
    found: Sequence[Advice], loss: float, problems: Problems, model: Model, recording: Recording
) -> dict[str, dict[str, Any]]:
    graded, done = {DENSE: _grade(None, problems, model, recording)}, set()
    for one in found:
        if one.row.policy not in done:
            graded[_key(one)] = _grade(one, problems, model, recording)
            if _is_right(graded, one, loss):
                done.add(one.row.policy)
    return graded


def _is_right(graded: dict[str, dict[str, Any]], one: Advice, loss: float) -> bool:
    mine = graded.get(_key(one))
    return mine is not None and mine["share"] >= graded[DENSE]["share"] - loss


def _grade(one: Advice | None, problems: Problems, model: Model, recording: Recording) -> dict[str, Any]:
    from longthink.lab.evaluate.plan import Plan
    from longthink.lab.evaluate.summary import summarize
    from longthink.lab.evaluate.sweep import Sweep
    from longthink.lab.results.statistics import wilson
    from longthink.lab.results.store import ResultStore
    from longthink.lab.work.workers import run_work

    out = recording.out.expanduser()
    store = ResultStore(out.with_name(f"{out.name}-answers"))
    bounded: dict[str, Any] = {}
    if one is not None:
        bounded = {"policies": (one.row.policy,), "decode_budgets": (one.row.decode_budget,)}
    plan = Plan(
        **asdict(model), tasks=tuple(problems.names), data=tuple(map(str, problems.data or ())),
        count=problems.count, seed=problems.seed, max_new_tokens=problems.max_new_tokens, **bounded,
    )  # fmt: skip
    sweep = Sweep(plan, plan.load_tasks(), store)
    run_work(sweep)
    rows = summarize(store, sweep.configs)
    total = sum(row.problems for row in rows)
    right = sum(row.accuracy * row.problems for row in rows)
    low, high = wilson(right, total)
    found = {"right": right, "problems": total, "share": right / total, "low": low, "high": high}
    note(f"{DENSE if one is None else _key(one)}: {_right(found)} right")
    return found


def _print(best: Sequence[Advice], graded: dict[str, dict[str, Any]], options: AdviseOptions) -> None:
    if not best:
        also = " and is right as often as Dense within the loss" if options.accuracy else ""
        kept, remedy = f"{1 - options.loss:.1%}", "raise --loss, or name larger --decode-budgets"
        write_text(f"No policy keeps {kept} of {options.measure}{also} at any of the budgets: {remedy}\n")
        return
    first = best[0]
    text = (
        f"Smallest: {first.row.policy} with --decode-budget {first.row.decode_budget} keeps {first.kept:.1%} of what "
        f"Dense reads ({options.measure}) in {size_text(first.bytes)} per request instead of "
        f"{size_text(first.dense_kv_bytes)}: {first.requests:,} requests in {options.gpu_memory:g} GiB beside the "
        f"weights instead of {first.dense_requests:,}."
    )
    write_text(one_line(text) + "\n")

    def cells(one: Advice) -> list[str]:
        row, right = one.row, [_right(graded[_key(one)])] if graded else []
        kept = [budget_text(row.budget, row.decode_budget), f"{row.lookups:.1%}", f"{row.recall:.1%}"]
        return [row.policy, *kept, size_text(one.bytes), f"{one.requests:,}", *right]

    headings = ["policy", "budget", "look-ups", "recall", "per request", "requests"]
    write_table(policy_table(headings + ["right"] * bool(graded), map(cells, best)))
    if graded:
        write_text(f"Dense: {_right(graded[DENSE])} right.\n")


def _right(found: dict[str, Any]) -> str:
    return f"{found['right']:g}/{found['problems']} ({100 * found['low']:.0f}-{found['high']:.0%})"
