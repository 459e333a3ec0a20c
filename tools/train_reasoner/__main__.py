"""``python -m tools.train_reasoner``: train the built-in model, and evaluate it for its card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from longthink.cli.errors import EXIT_INTERRUPTED, guarded
from longthink.cli.progress import progress
from longthink.cli.terminal import note, write_text
from longthink.cli.text import visible
from tools.train_reasoner.config import TrainConfig
from tools.train_reasoner.evaluate import PROBLEMS, SEED, WEIGHTS
from tools.train_reasoner.evaluate import evaluate as evaluate_model
from tools.train_reasoner.trainer import train as train_model

app = App(
    name="python -m tools.train_reasoner",
    help="Make the weights of the built-in model.",
    suppress_keyboard_interrupt=False,
)
_CONFIG = TrainConfig()


@app.command
def train(
    out: Path, /, *, start: Path | None = None, config: Annotated[TrainConfig, Parameter(name="*")] = _CONFIG
) -> int:
    """Train the model from scratch, or from the weights of another run.

    The same command resumes an interrupted run. The defaults made the shipped weights, in about half an hour on one
    CPU core.

    Parameters
    ----------
    out
        Folder of the run: checkpoint, metrics.jsonl and, at the end, the model.
    start
        Folder of a run, or of its model, with whose weights to start.
    """
    with progress(f"training in {out}", total=config.tokens, unit="tokens") as task:

        def report(record: dict[str, Any]) -> None:
            detail = f"loss {record['loss']:.3f}, problems of up to {record['longest']} lines"
            task.advance_to(record["tokens"], f"{detail}, {record['tokens_per_second']:,} tokens/s")

        result = train_model(config, out=out, start=start, report=report)
    if result.model is None:
        note(f"interrupted after {result.tokens:,} tokens and saved: the same command resumes the run")
        return EXIT_INTERRUPTED
    write_text(f"{visible(str(result.model))}\n")
    return 0


@app.command
def evaluate(
    folder: Path = WEIGHTS,
    /,
    *,
    seed: int = SEED,
    s: int = PROBLEMS["s"],
    m: int = PROBLEMS["m"],
    l: int = PROBLEMS["l"],  # noqa: E741 (sizes have one-letter names)
    xl: int = PROBLEMS["xl"],
) -> int:
    """Evaluate a model on held-out problems, and write its ``evaluation.json`` and model card.

    Parameters
    ----------
    folder
        The model [default: the shipped weights].
    seed
        First seed of the problems.
    s, m, l, xl
        Problems of this size for each profile; 0 leaves the size out.
    """
    counts = {size: count for size, count in {"s": s, "m": m, "l": l, "xl": xl}.items() if count}
    evaluate_model(folder, problems=counts, seed=seed)
    return 0


def main(words: list[str] | None = None) -> int:
    """Run a command, on ``sys.argv`` unless words are given, with the exit codes of ``longthink``."""

    def action() -> int:
        code = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        return code if isinstance(code, int) else 0

    return guarded(action, debug=False)


if __name__ == "__main__":
    sys.exit(main())
