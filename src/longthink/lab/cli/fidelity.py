"""``longthink fidelity``: predictions under a bounded cache beside those of the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, get_type_hints

from cyclopts import Group, Parameter

from longthink.cli.options import Switch
from longthink.cli.progress import progress
from longthink.cli.terminal import note, write_json, write_table
from longthink.cli.text import size_text
from longthink.config import check_int
from longthink.environment import hardware, versions
from longthink.lab.cli.analyze_options import Files
from longthink.lab.cli.eval import DEFAULT_OUT, ModelFlags, given
from longthink.lab.cli.eval import PolicyFlags as EvalPolicyFlags
from longthink.lab.cli.tables import budget_text, policy_table
from longthink.lab.cli.work import carry_out, note_outcome

if TYPE_CHECKING:
    from longthink.lab.fidelity.summary import Summary
    from longthink.lab.fidelity.sweep import FidelitySweep
    from longthink.lab.results.statistics import Interval


@Parameter(name="*", group=Group("Texts", sort_key=0))
@dataclass(frozen=True, kw_only=True)
class TextFlags:
    data: Files = None
    """File of texts (.jsonl, .parquet): question and reasoning, or plain text; repeatable."""
    tasks: str | None = None
    """Instead of files: problem sets as in `longthink eval`; the texts are the model's own dense answers."""
    count: Annotated[int | None, Parameter(name=("--count", "-n"))] = None
    """Texts per file or task [default: all]."""
    max_tokens: int | None = None
    """Cut each text after so many tokens behind the question."""


@Parameter(name="*", group=Group("Policies", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class PolicyFlags(EvalPolicyFlags):
    policies: str | None = None
    """Such as raas:r=0.25,snapkv [default: recall,raas,recency]."""


@Parameter(name="*", group=Group("Run", sort_key=4))
@dataclass(frozen=True, kw_only=True)
class RunFlags:
    rows: int | None = None
    """Texts read side by side [default: 4]."""
    workers: int | None = None
    """Processes with a model each [default: 1]; with --ray, tasks at a time [default: all of the cluster]."""
    ray: str | None = None
    """Ray cluster to run on: its address, auto, or local."""
    out: str = DEFAULT_OUT
    """Result store, a folder or s3://bucket/results; stored measurements are not repeated."""
    json: Switch = False
    """Print one JSON document instead of the table."""


@Parameter(name="*", group=Group("Run", sort_key=4))
@dataclass(frozen=True, kw_only=True)
class ComparedRunFlags(RunFlags):
    reference: str = "recency"
    """Policy that the others are compared with, text by text."""


_TEXTS, _POLICIES, _MODEL, _RUN = TextFlags(), PolicyFlags(), ModelFlags(), ComparedRunFlags()


def fidelity(
    *, texts: TextFlags = _TEXTS, policies: PolicyFlags = _POLICIES, model: ModelFlags = _MODEL,
    run: ComparedRunFlags = _RUN,
) -> int:  # fmt: skip
    """Measure how far predictions under a bounded cache are from those of the dense model.

    The text is given, so nothing is sampled, and a few texts say much: docs/fidelity.md.
    """
    from longthink.lab.evaluate.settings import typed_settings
    from longthink.lab.fidelity.plan import Plan
    from longthink.lab.fidelity.sweep import FidelitySweep
    from longthink.lab.results.object_store import open_store

    values = given(texts, policies, model) | ({} if run.rows is None else {"rows": run.rows})
    plan = Plan(**typed_settings(values, get_type_hints(Plan)))
    if run.workers is not None:
        check_int("workers", run.workers, 1)
    # The texts first: if they cannot be read, no empty store must stay.
    chosen = plan.load_texts()
    sweep = FidelitySweep(plan, chosen, open_store(run.out), say=note)
    code = carry_out(sweep, watching(sweep), workers=run.workers, ray=run.ray)
    if sweep.identity is not None:
        _show(sweep, run)
    note_outcome(sweep)
    return code


@contextmanager
def watching(sweep: FidelitySweep) -> Iterator[None]:
    total = len(sweep.texts) * len(sweep.plan.caches)
    with progress(f"reading with {sweep.plan.model}", total=total, unit="texts under a cache") as task:
        sweep.report = lambda sweep: task.advance_to(total - sweep.total.left)
        yield


def _show(sweep: FidelitySweep, run: ComparedRunFlags) -> None:
    from longthink.lab.fidelity.summary import summarize

    rows = summarize(sweep.store, sweep.configs, reference=run.reference)
    if not run.json:
        print_fidelity(rows, run.reference)
        return
    document = {"plan": asdict(sweep.plan), "store": sweep.store.place, "complete": sweep.is_complete}
    document |= {"reference": run.reference, "rows": [asdict(row) for row in rows]}
    write_json(document | {"versions": versions(), "hardware": hardware()})


def print_fidelity(rows: Sequence[Summary], reference: str) -> None:
    table = [
        [row.policy, budget_text(row.budget, row.decode_budget), str(row.texts), size_text(row.kv_bytes),
         _interval(row.loss), _interval(row.kl), _interval(row.versus.get("kl"), sign="+"),
         _percent(row.differs), _interval(row.long_loss, 2), str(row.long_tokens)]
        for row in rows
    ]  # fmt: skip
    headings = (
        "policy", "budget", "texts", "held", "loss", "KL", f"KL - {reference}", "other top", "long loss", "long",
    )  # fmt: skip
    caption = (
        "loss: rise per token in nats, KL: divergence from dense, other top: most likely token differs; with 95 % "
        "intervals over texts. long: tokens that dense is sure of and the window has lost"
    )
    if unscored := max((row.unscored for row in rows), default=0):
        caption += (
            f". Up to {unscored} texts of a row were not scored: they end within the budget, or their prompt leaves "
            "no room for the policy, or for the window of the same size, which pins the prompt"
        )
    write_table(policy_table(headings, table, caption=caption))


def _interval(value: Interval | None, digits: int = 3, *, sign: str = "") -> str:
    return "-" if value is None else value.text(digits, sign=sign)


def _percent(value: Interval | None) -> str:
    return "-" if value is None else f"{value.mean:.1%}"
