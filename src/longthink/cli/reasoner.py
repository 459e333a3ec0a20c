"""``longthink reasoner``: the built-in model's problems, training and accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from longthink.cli.errors import EXIT_INTERRUPTED
from longthink.cli.models import load_model
from longthink.cli.options import REASONER, ModelOptions, ProblemOptions, SizeName, Switch
from longthink.cli.progress import progress
from longthink.cli.terminal import note, out_console, visible, write_json, write_text
from longthink.config import check_int
from longthink.reasoner.config import TrainConfig
from longthink.reasoner.profiles import PROFILES

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

    An interrupted run goes on when the same command is given again. The defaults are the recipe of the weights that
    come with the package.

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
class EvalOptions:
    """Options of ``longthink reasoner eval``."""

    model: str = REASONER
    """The built-in model, or the "model" folder of a training run."""

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
    """Measure the accuracy on held-out problems, with the dense cache and greedy decoding."""
    from longthink.reasoner.evaluate import solve, wilson
    from longthink.reasoner.task import grade, make_problems

    loaded = load_model(ModelOptions(model=options.model))
    rows: list[dict[str, Any]] = []
    with progress("solving", total=len(PROFILES) * options.problems, unit="problems") as task:
        for profile in PROFILES:
            chosen = make_problems(options.problems, profile=profile, size=options.size, seed=options.seed)
            texts = solve(loaded.model, loaded.tokenizer, chosen)
            right = sum(grade(made, text) for made, text in zip(chosen, texts, strict=True))
            low, high = wilson(right, options.problems)
            rows.append(
                {"profile": profile, "problems": options.problems, "right": right, "low": low, "high": high}
            )
            task.advance_to(len(rows) * options.problems)
    if options.json:
        write_json({"model": options.model, "size": options.size, "seed": options.seed, "rows": rows})
    else:
        _print_accuracy(rows, options)
    return 0


def _print_accuracy(rows: list[dict[str, Any]], options: EvalOptions) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("profile", "right", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "profile" else "right", no_wrap=True)
    for row in rows:
        share = f"{row['right']}/{row['problems']}"
        table.add_row(row["profile"], share, f"{row['low']:.1%} to {row['high']:.1%}")
    console = out_console()
    console.print(Text(visible(f"{options.model}, size {options.size}, dense, greedy")))
    console.print(table)
