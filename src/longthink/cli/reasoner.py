"""``longthink reasoner``: the built-in model's problems and training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from longthink.cli.errors import EXIT_INTERRUPTED
from longthink.cli.options import ProblemOptions
from longthink.cli.progress import progress
from longthink.cli.terminal import note, visible, write_text
from longthink.reasoner.config import TrainConfig

reasoner_app = App(
    name="reasoner",
    help="The built-in reasoning model: its problems and its training.",
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
def train(
    out: Path, /, *, start: Path | None = None, config: Annotated[TrainConfig, Parameter(name="*")] = _CONFIG
) -> int:
    """Train the built-in model, from scratch or from where another run ended.

    An interrupted run goes on when the same command is given again. The defaults made the weights that come with the
    package, in about half an hour on one CPU core.

    Parameters
    ----------
    out
        Folder of the run: checkpoint, metrics.jsonl and, at the end, the model.
    start
        Folder of another run, with whose weights this one begins.
    """
    from longthink.reasoner import train as train_model

    with progress(f"training in {out}", total=config.tokens, unit="tokens") as task:

        def report(record: dict[str, Any]) -> None:
            detail = f"loss {record['loss']:.3f}, problems of up to {record['longest']} lines"
            task.advance_to(record["tokens"], f"{detail}, {record['tokens_per_second']:,} tokens/s")

        result = train_model(config, out=out, start=start, report=report)
    if result.model is None:
        note(f"interrupted after {result.tokens:,} tokens and saved: give the same command to go on")
        return EXIT_INTERRUPTED
    write_text(f"{visible(str(result.model))}\n")
    return 0
