"""``longthink advise``: which policy, and how small a budget, from the fidelity of a few texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, get_type_hints

from cyclopts import Group, Parameter

from longthink.cli.options import Switch
from longthink.cli.terminal import note, write_json, write_table, write_text
from longthink.cli.text import one_line, size_text
from longthink.lab.cli.eval import ModelFlags, given
from longthink.lab.cli.fidelity import RunFlags, TextFlags, watching
from longthink.lab.cli.tables import budget_text, policy_table
from longthink.lab.cli.work import carry_out, note_outcome

if TYPE_CHECKING:
    from longthink.lab.fidelity.advice import Advice
    from longthink.lab.fidelity.plan import Plan
    from longthink.lab.fidelity.sweep import FidelitySweep
    from longthink.lab.results.store import ResultStore

DENSE = "dense"
TASKS, COUNT = "reasoner/s", 2  # where no texts are named


@Parameter(name="*", group=Group("Advice", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class AdviseFlags:
    policies: str = "recall,raas,recency"
    """Policies to choose from."""
    decode_budgets: str = "64,128,256,512,1024"
    """Budgets on top of the prompt to choose from."""
    kl: float = 0.05
    """How far the predictions may be from those of dense (KL divergence, nats per token)."""
    gpu_memory: float = 24.0
    """Memory for weights and caches (GiB)."""
    accuracy: Switch = False
    """Also solve the problems of --tasks, and take only budgets that solve as many as Dense, or 2 % fewer."""


_TEXTS, _ADVICE, _MODEL, _RUN = TextFlags(), AdviseFlags(), ModelFlags(), RunFlags()
LOST = 0.02
"""Share of the problems that may be lost with --accuracy."""


def advise(
    *,
    texts: TextFlags = _TEXTS,
    advice: AdviseFlags = _ADVICE,
    model: ModelFlags = _MODEL,
    run: RunFlags = _RUN,
) -> int:
    """Find the policy and the smallest budget under which a model predicts as with a dense cache.

    Measures fidelity as `longthink fidelity` does, with the same store: docs/fidelity.md. Texts are by default the
    answers to two problems of each built-in profile.
    """
    from longthink.lab.evaluate.settings import typed_settings
    from longthink.lab.fidelity.plan import Plan
    from longthink.lab.fidelity.sweep import FidelitySweep
    from longthink.lab.results.object_store import open_store

    if texts.data is None and texts.tasks is None:
        texts = replace(texts, tasks=TASKS, count=texts.count or COUNT)
    if advice.accuracy and texts.tasks is None:
        raise ValueError("--accuracy needs --tasks: texts of --data have no answers to grade")
    chosen = {"policies": advice.policies, "decode_budgets": advice.decode_budgets}
    rows = {} if run.rows is None else {"rows": run.rows}
    plan = Plan(**typed_settings(given(texts, model) | chosen | rows, get_type_hints(Plan)))
    sweep = FidelitySweep(plan, plan.load_texts(), open_store(run.out), say=note)
    code = carry_out(sweep, watching(sweep), workers=run.workers, ray=run.ray)
    if sweep.is_complete:
        _advise(sweep, advice, as_json=run.json)
    note_outcome(sweep)
    return code


def _advise(sweep: FidelitySweep, flags: AdviseFlags, *, as_json: bool) -> None:
    from longthink.lab.fidelity.advice import advise as rank
    from longthink.lab.fidelity.advice import shape_of
    from longthink.lab.fidelity.summary import summarize
    from longthink.models import load_empty

    plan, rows = sweep.plan, summarize(sweep.store, sweep.configs)
    shape = shape_of(load_empty(plan.model, dtype=plan.dtype, revision=plan.revision), _lengths(sweep))
    found = rank(rows, shape, kl=flags.kl, memory=int(flags.gpu_memory * 2**30))
    graded = _grade_all(found, plan, sweep.store) if flags.accuracy and found else {}
    if graded:
        found = [one for one in found if _is_right(graded, one)]
    best: dict[str, Advice] = {}
    for one in found:  # the smallest budget comes first
        best.setdefault(one.row.policy, one)
    if not as_json:
        _print(list(best.values()), graded, flags)
        return
    advice = [asdict(one) | {"accuracy": graded.get(_key(one))} for one in best.values()]
    plain = asdict(shape) | {"dtype": str(shape.dtype).removeprefix("torch.")}
    document = {"shape": plain, "advice": advice, "accuracy": graded or None}
    write_json(document | {"rows": [asdict(row) for row in rows]})


def _lengths(sweep: FidelitySweep) -> list[tuple[int, int]]:
    """Prompt and decoded tokens of every text."""
    rows = sweep.store.query(
        "SELECT DISTINCT source, text, prompt_tokens, decoded_tokens FROM fidelity "
        "WHERE config IN (SELECT unnest($configs))",
        {"configs": sweep.configs},
    )
    return [(row["prompt_tokens"], row["decoded_tokens"]) for row in rows]


def _key(one: Advice) -> str:
    return f"{one.row.policy} {one.row.decode_budget}"


def _grade_all(found: Sequence[Advice], plan: Plan, store: ResultStore) -> dict[str, dict[str, Any]]:
    """Grades of dense, and of each policy at rising budgets up to one that is right often enough."""
    graded, done = {DENSE: _grade(None, plan, store)}, set()
    for one in found:
        if one.row.policy not in done:
            graded[_key(one)] = _grade(one, plan, store)
            if _is_right(graded, one):
                done.add(one.row.policy)
    return graded


def _is_right(graded: dict[str, dict[str, Any]], one: Advice) -> bool:
    mine = graded.get(_key(one))
    return mine is not None and mine["share"] >= graded[DENSE]["share"] - LOST


def _grade(one: Advice | None, plan: Plan, store: ResultStore) -> dict[str, Any]:
    from longthink.lab.evaluate.plan import Plan as EvalPlan
    from longthink.lab.evaluate.summary import summarize
    from longthink.lab.evaluate.sweep import Sweep
    from longthink.lab.results.statistics import wilson
    from longthink.lab.work.workers import run_work

    bounded: dict[str, Any] = {}
    if one is not None:
        bounded = {"policies": (one.row.policy,), "decode_budgets": (one.row.decode_budget,)}
    same = {name: getattr(plan, name) for name in ("model", "revision", "device", "dtype", "tasks", "count")}
    asked = EvalPlan(**same, max_new_tokens=plan.max_tokens, **bounded)
    sweep = Sweep(asked, asked.load_tasks(), store)
    run_work(sweep)
    rows = summarize(store, sweep.configs)
    total = sum(row.problems for row in rows)
    right = sum(row.accuracy * row.problems for row in rows)
    low, high = wilson(right, total)
    found = {"right": right, "problems": total, "share": right / total, "low": low, "high": high}
    note(f"{DENSE if one is None else _key(one)}: {_right(found)} right")
    return found


def _print(best: Sequence[Advice], graded: dict[str, dict[str, Any]], flags: AdviseFlags) -> None:
    if not best:
        also = " and solves as much as Dense" if flags.accuracy else ""
        remedy = "raise --kl, or name larger --decode-budgets (texts must be longer than they are)"
        write_text(f"No policy is within {flags.kl:g} nats of Dense{also} at any of the budgets: {remedy}\n")
        return
    first = best[0]
    assert first.row.kl is not None
    text = (
        f"Smallest: {first.row.policy} with --decode-budget {first.row.decode_budget} is {first.row.kl.mean:.3f} "
        f"nats per token from Dense (KL) in {size_text(first.bytes)} per request instead of "
        f"{size_text(first.dense_kv_bytes)}: {first.requests:,} requests in {flags.gpu_memory:g} GiB beside the "
        f"weights instead of {first.dense_requests:,}."
    )
    write_text(one_line(text) + "\n")

    def cells(one: Advice) -> list[str]:
        row, right = one.row, [_right(graded[_key(one)])] if graded else []
        near = ["-" if value is None else value.text(3) for value in (row.kl, row.loss)]
        budget = budget_text(row.budget, row.decode_budget)
        return [row.policy, budget, *near, size_text(one.bytes), f"{one.requests:,}", *right]

    headings = ["policy", "budget", "KL", "loss", "per request", "requests"]
    write_table(policy_table(headings + ["right"] * bool(graded), map(cells, best)))
    if graded:
        write_text(f"Dense: {_right(graded[DENSE])} right.\n")


def _right(found: dict[str, Any]) -> str:
    return f"{found['right']:g}/{found['problems']} ({100 * found['low']:.0f}-{found['high']:.0%})"
