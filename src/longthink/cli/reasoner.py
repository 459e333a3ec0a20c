"""``longthink reasoner``: the built-in model's problems, training and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from longthink.cli.errors import EXIT_INTERRUPTED
from longthink.cli.models import load_model
from longthink.cli.options import (
    BudgetOptions,
    ModelOptions,
    ProblemOptions,
    SizeName,
    Switch,
    policy_list,
)
from longthink.cli.progress import progress
from longthink.cli.terminal import note, out_console, visible, write_json, write_text
from longthink.config import Budget, check_int
from longthink.models import REASONER
from longthink.reasoner.config import TrainConfig
from longthink.reasoner.profiles import PROFILES
from longthink.results.environment import versions

if TYPE_CHECKING:
    from longthink.models import Loaded
    from longthink.policies import Policy

reasoner_app = App(
    name="reasoner",
    help="The built-in reasoning model: its problems, its training, its accuracy.",
    suppress_keyboard_interrupt=False,
)

_PROBLEM = ProblemOptions()
_CONFIG = TrainConfig()


@reasoner_app.command
def problem(*, options: ProblemOptions = _PROBLEM) -> int:
    """Print a problem and its worked solution."""
    from longthink.reasoner import make_problem

    made = make_problem(seed=options.seed, profile=options.profile, size=options.size)
    write_text(f"Problem\n{made.prompt}\n\nSolution\n{made.solution}\n\nAnswer\n{made.answer}\n")
    return 0


@reasoner_app.command
def train(out: Path, /, *, config: Annotated[TrainConfig, Parameter(name="*")] = _CONFIG) -> int:
    """Train the built-in model from scratch.

    An interrupted run goes on when the same command is given again. The defaults follow the recipe of the weights
    that come with the package, and have not reached them yet: see the model card.

    Parameters
    ----------
    out
        Folder of the run: checkpoint, metrics.jsonl and, at the end, the model.
    """
    from longthink.reasoner import train as train_model

    with progress(f"training in {out}", total=config.tokens, unit="tokens") as task:

        def report(record: dict[str, Any]) -> None:
            detail = f"loss {record['loss']:.3f}, problems of up to {record['longest']} lines"
            task.advance_to(record["tokens"], f"{detail}, {record['tokens_per_second']:,} tokens/s")

        result = train_model(config, out=out, report=report)
    if result.model is None:
        note(f"interrupted after {result.tokens:,} tokens and saved: give the same command to go on")
        return EXIT_INTERRUPTED
    write_text(f"{visible(str(result.model))}\n")
    return 0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvalOptions(BudgetOptions):
    """Options of ``longthink reasoner eval``."""

    model: str = REASONER
    """The built-in model, or the "model" folder of a training run."""

    policies: str = "dense"
    """Policies to evaluate, separated by commas; options after colons, such as dense,raas:r=0.25."""

    size: SizeName = "m"
    """Length of the chains of thought."""

    problems: int = 25
    """Problems of each profile."""

    seed: int = 1_000_000
    """Seed of the first problem; all are of the test split, which training never sees."""

    json: Switch = False
    """Print one JSON document instead of the table."""

    def __post_init__(self) -> None:
        check_int("problems", self.problems, 1)


_EVAL = EvalOptions()


@reasoner_app.command(name="eval")
def evaluate(*, options: EvalOptions = _EVAL) -> int:
    """Measure the accuracy on held-out problems, policy by policy, with greedy decoding."""
    policies = policy_list(options.policies)
    if options.given_budget or any(policy.needs_budget for policy in policies):
        Budget(**options.given_budget)
    loaded = load_model(ModelOptions(model=options.model))
    rows: list[dict[str, Any]] = []
    each = len(PROFILES) * options.problems
    with progress("solving", total=len(policies) * each, unit="problems") as task:
        for policy in policies:
            for profile in PROFILES:
                rows.append(_accuracy(loaded, policy, profile, options))
                task.advance_to(len(rows) * options.problems, f"{policy.spec()}, {profile}")
    if options.json:
        write_json(
            {
                "model": options.model,
                "size": options.size,
                "seed": options.seed,
                "budget": options.budget,
                "decode_budget": options.decode_budget,
                "rows": rows,
                "versions": versions(),
            }
        )
    else:
        _print_accuracy(rows, options)
    return 0


def _accuracy(loaded: Loaded, policy: Policy, profile: str, options: EvalOptions) -> dict[str, Any]:
    """Solve the problems of one profile with one policy."""
    from longthink.hf import generate
    from longthink.reasoner.evaluate import solve
    from longthink.reasoner.task import grade, make_problems
    from longthink.results.statistics import wilson

    chosen = make_problems(options.problems, profile=profile, size=options.size, seed=options.seed)
    kept = {"budget": options.budget, "decode_budget": options.decode_budget} if policy.needs_budget else {}
    bounded: Callable[..., Any] = partial(generate, loaded.model, policy=policy, **kept)  # type: ignore[arg-type]
    texts = solve(loaded.model, loaded.tokenizer, chosen, generate=bounded)
    right = sum(grade(made, text) for made, text in zip(chosen, texts, strict=True))
    low, high = wilson(right, options.problems)
    return {
        "policy": policy.to_dict(),
        "spec": policy.spec(),
        "profile": profile,
        "problems": options.problems,
        "right": right,
        "low": low,
        "high": high,
    }


def _print_accuracy(rows: list[dict[str, Any]], options: EvalOptions) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from longthink.results.statistics import wilson

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("policy", *PROFILES, "all", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "policy" else "right", overflow="fold")
    for spec in dict.fromkeys(row["spec"] for row in rows):
        right = [row["right"] for row in rows if row["spec"] == spec]
        problems = options.problems * len(right)
        low, high = wilson(sum(right), problems)
        cells = [f"{count}/{options.problems}" for count in right]
        table.add_row(Text(spec), *cells, f"{sum(right)}/{problems}", f"{low:.0%} to {high:.0%}")
    console = out_console()
    kept = ", ".join(f"{name} {value}" for name, value in options.given_budget.items())
    console.print(Text(visible(f"{options.model}, size {options.size}, greedy{kept and ', '}{kept}")))
    console.print(table)
