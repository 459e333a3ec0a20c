"""Accuracy of a model on held-out problems, and the table of the model card.

``python -m longthink.reasoner.evaluate`` evaluates the shipped weights and writes ``evaluation.json`` and the model
card ``README.md`` beside them. Decoding is dense and greedy, through transformers' ``generate``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from longthink.lab.results.statistics import wilson
from longthink.reasoner.card import write_card
from longthink.reasoner.pretrained import load_folder
from longthink.reasoner.profiles import PROFILES
from longthink.reasoner.task import SIZES, Problem, grade, make_problems
from longthink.reasoner.vocabulary import EOS

SEED = 1_000_000
"""First seed of the evaluation; training draws from the other split altogether."""
PROBLEMS = {"s": 100, "m": 100, "l": 200, "xl": 50}
"""Problems per profile."""


@torch.no_grad()
def solve(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    batch: int = 50,
) -> list[str]:
    """Return what the model writes after each prompt, by greedy decoding in left-padded batches.

    Parameters
    ----------
    batch
        Problems decoded side by side.
    """
    texts = []
    for start in range(0, len(problems), batch):
        chosen = problems[start : start + batch]
        inputs = tokenizer([problem.prompt for problem in chosen], return_tensors="pt", padding=True)
        longest = max(len(problem.solution.split()) for problem in chosen)
        # A few tokens more than the solution has: a model that does not stop is wrong, and should be seen to be.
        output = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=longest + 8)
        texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    return texts


def evaluate(
    folder: Path | str, *, problems: dict[str, int] | None = None, seed: int = SEED
) -> dict[str, Any]:
    """Evaluate the checkpoint in ``folder`` and write ``evaluation.json`` and the model card there.

    Parameters
    ----------
    folder
        A folder written by `train` or `export_run`.
    problems
        Problems per profile for each size; all profiles are evaluated.
    seed
        First seed.

    Returns
    -------
    dict
        What ``evaluation.json`` holds.
    """
    folder = Path(folder)
    model, tokenizer = load_folder(folder)
    rows = []
    for size, count in (problems or PROBLEMS).items():
        for profile in PROFILES:
            rows.append(_row(model, tokenizer, size, profile, count, seed))
            print(f"{size:>3} {profile:<10} {rows[-1]['right']}/{count} right", flush=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "seed": seed,
        "split": "test",
        "decoding": "dense, greedy, fp32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    write_card(folder)
    return result


def _row(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    size: str,
    profile: str,
    count: int,
    seed: int,
) -> dict[str, Any]:
    started = time.perf_counter()
    problems = make_problems(count, profile=profile, size=size, seed=seed)
    pairs = list(zip(problems, solve(model, tokenizer, problems), strict=True))
    right = sum(grade(problem, text) for problem, text in pairs)
    low, high = wilson(right, count)
    return {
        "size": size,
        "profile": profile,
        "problems": count,
        "right": right,
        "every_token_right": sum(text.split(EOS)[0].split() == made.solution.split() for made, text in pairs),
        "low": round(low, 4),
        "high": round(high, 4),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Run the evaluation from the command line."""
    parser = argparse.ArgumentParser(description="Evaluate the built-in reasoner and write its model card.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--seed", type=int, default=SEED, help="first seed of the problems")
    for size in SIZES:
        parser.add_argument(
            f"--{size}", type=int, default=PROBLEMS[size], metavar="N", help="problems per profile (0: none)"
        )
    options = parser.parse_args()
    counts = {size: getattr(options, size) for size in SIZES if getattr(options, size)}
    evaluate(options.folder, problems=counts, seed=options.seed)


if __name__ == "__main__":
    main()
