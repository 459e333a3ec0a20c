"""``longthink eval``: accuracy of policies at budgets, on problem sets, into a result store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from longthink.cli.errors import EXIT_INTERRUPTED
from longthink.cli.options import Switch
from longthink.cli.terminal import note, visible, write_json, write_table
from longthink.config import check_int
from longthink.environment import hardware, versions

if TYPE_CHECKING:
    from longthink.lab.evaluate.summary import Row
    from longthink.lab.evaluate.sweep import Sweep

DEFAULT_OUT = "results"
"""Folder of the store unless one is given."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of ``longthink eval``. None stands for "not given": then the file counts, and then the default."""

    config: Path | None = None
    """YAML or TOML file with any of the other options; those given here count more."""

    model: str | None = None
    """Hub id or local folder of a causal language model (safetensors) [default: reasoner, the built-in one]."""

    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""

    device: str | None = None
    """Device such as cpu or cuda:1 [default: auto, the first accelerator there is]."""

    dtype: str | None = None
    """float32, bfloat16, float16 or auto [default: auto, the checkpoint's own]."""

    tasks: str | None = None
    """Problem sets, separated by commas: gsm8k, math500, aime24, aime25, aime, reasoner/SIZE/PROFILE, or the name of
    a file given with --data."""

    data: list[Path] | None = None
    """Problem file (.jsonl, .parquet), a task named by its stem; may be given several times."""

    count: Annotated[int | None, Parameter(name=("--count", "-n"))] = None
    """Problems of each task [default: all]."""

    choose: str | None = None
    """Which problems: first or random [default: first]."""

    seed: int | None = None
    """Seed of the random choice, and first seed of built-in problems [default: 0]."""

    policies: str | None = None
    """Policies, separated by commas; options after colons, such as dense,raas:r=0.25 [default: dense]."""

    budgets: str | None = None
    """Tokens kept per layer, prompt included, separated by commas."""

    decode_budgets: str | None = None
    """Tokens kept per layer on top of the prompt, separated by commas."""

    sampling_seeds: str | None = None
    """Seeds of sampling and of random policies, separated by commas [default: 0]."""

    samples: int | None = None
    """Samples of each problem and seed [default: 1]; more need a temperature above 0."""

    temperature: float | None = None
    """Softmax temperature [default: 0, always the most likely token]."""

    top_p: float | None = None
    """Sample from the smallest set of tokens with this probability."""

    top_k: int | None = None
    """Sample from this many most likely tokens."""

    max_new_tokens: int | None = None
    """Tokens of an answer at most [default: each task's own limit]."""

    rows: int | None = None
    """Samples decoded side by side in each process [default: 32; 8 unless the model is the built-in one]."""

    workers: int | None = None
    """Processes with a model each [default: 1]; with --ray, tasks at the same time [default: all of the cluster]."""

    ray: str | None = None
    """Run on a Ray cluster: its address, auto, or local for one on this machine (needs the extra ray)."""

    out: Path | None = None
    """Folder of the result store [default: results]. What is in it already is not done again."""

    json: Switch = False
    """Print one JSON document instead of the table."""

    def given(self) -> dict[str, Any]:
        """Return what was given on the command line, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["config"], values["json"]
        if self.data is not None:
            values["data"] = [str(path) for path in self.data]
        if self.out is not None:
            values["out"] = str(self.out)
        return {name: value for name, value in values.items() if value is not None}


_DEFAULTS = EvalOptions()


def evaluate(*, options: EvalOptions = _DEFAULTS) -> int:
    """Measure the accuracy of policies at budgets on problem sets.

    Every sample is stored as soon as it is complete. Give the same command again after an interruption, and only
    what is missing is made.
    """
    from longthink.lab.cli.eval_view import watching
    from longthink.lab.evaluate.settings import make_plan, read_settings
    from longthink.lab.evaluate.sweep import Sweep, run_sweep
    from longthink.lab.results.store import ResultStore

    from_file = {} if options.config is None else read_settings(options.config.expanduser())
    plan, run = make_plan(from_file | options.given())
    workers = run.get("workers")
    if workers is not None:
        check_int("workers", workers, 1)
    # Problem sets first: what cannot be read must not leave an empty store.
    tasks = plan.load_tasks()
    sweep = Sweep(plan, tasks, ResultStore(Path(run.get("out", DEFAULT_OUT)).expanduser()), say=note)
    code = 0
    try:
        with watching(sweep):
            outcome = run_sweep(sweep, workers=workers, ray=run.get("ray"))
    except KeyboardInterrupt:
        outcome = sweep.outcome
        note(
            f"interrupted: {outcome.made} samples were made and are stored; the same command goes on from there"
        )
        code = EXIT_INTERRUPTED
    if sweep.identity is not None:
        _show(sweep, options.json)
    died = f"; {outcome.lost_workers} workers died on the way" if outcome.lost_workers else ""
    note(f"{outcome.made} samples made, {outcome.stored} were there, all in {sweep.store.folder}{died}")
    return code


def _show(sweep: Sweep, as_json: bool) -> None:
    from longthink.lab.evaluate.summary import summarize

    rows = summarize(sweep.store, sweep.configs)
    if not as_json:
        _print_table(rows)
        return
    plan, outcome = sweep.plan, sweep.outcome
    write_json(
        {
            "plan": asdict(plan),
            "store": str(sweep.store.folder),
            "complete": sweep.is_complete,
            "outcome": asdict(outcome),
            "rows": [asdict(row) for row in rows],
            "versions": versions(),
            "hardware": hardware(),
        }
    )


def _print_table(rows: Sequence[Row]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    optional = {
        "majority": any(row.majority is not None for row in rows),
        "no room": any(row.no_room for row in rows),
        "NaN": any(row.nan for row in rows),
    }
    caption = "right: pass@1, with Wilson 95 % interval; cut: share of texts that did not end by themselves"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    # Wide enough for a name; what has options, or a long task, takes several lines on a narrow screen.
    table.add_column("policy", min_width=14, overflow="fold")
    table.add_column("budget", justify="right", no_wrap=True)
    table.add_column("task", min_width=10, overflow="fold")
    for heading in (
        "n",
        "right",
        "interval",
        "tokens",
        "cut",
        *(name for name in optional if optional[name]),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        more = {
            "majority": "" if row.majority is None else f"{row.majority:.1%}",
            "no room": str(row.no_room),
            "NaN": str(row.nan),
        }
        table.add_row(
            Text(visible(row.policy)),
            budget_text(row.budget, row.decode_budget),
            Text(visible(row.task)),
            str(row.problems),
            f"{row.accuracy:.1%}",
            f"{100 * row.low:.0f}-{row.high:.0%}",
            f"{row.tokens:.0f}",
            f"{row.truncated / row.samples:.0%}",
            *(more[name] for name, shown in optional.items() if shown),
        )
    write_table(table)


def budget_text(budget: int | None, decode_budget: int | None) -> str:
    """Return a budget as people read it; one on top of the prompt has a plus sign."""
    if budget is not None:
        return str(budget)
    return "-" if decode_budget is None else f"+{decode_budget}"
