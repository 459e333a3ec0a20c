"""Accuracy of a model on held-out problems: dense, greedy decoding by transformers' ``generate``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

import longthink.reasoner
from longthink.lab.results.statistics import wilson
from longthink.reasoner.pretrained import load_folder
from longthink.reasoner.profiles import PROFILES
from longthink.reasoner.task import Problem, grade, make_problems
from longthink.reasoner.vocabulary import EOS
from tools.train_reasoner.card import write_card

WEIGHTS = Path(longthink.reasoner.__file__).parent / "weights"
SEED = 1_000_000
"""First seed of the evaluation. Training problems come from the other split, whatever their seeds."""
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
    """Return the answers of the model, decoded greedily in left-padded batches of at most `batch` problems."""
    texts = []
    for start in range(0, len(problems), batch):
        some = problems[start : start + batch]
        inputs = tokenizer([problem.prompt for problem in some], return_tensors="pt", padding=True)
        longest = max(len(problem.solution.split()) for problem in some)
        # A few tokens more than the solution has, so that a model that does not stop is counted as wrong.
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
        Problems per profile for each size; all profiles are evaluated, and at sizes s and m the problems of one
        profile as second questions behind those of another.
    seed
        First seed.

    Returns
    -------
    dict
        The contents of ``evaluation.json``.
    """
    folder = Path(folder)
    model, tokenizer = load_folder(folder)
    rows = []
    for size, count in (problems or PROBLEMS).items():
        sets = {profile: make_problems(count, profile=profile, size=size, seed=seed) for profile in PROFILES}
        if size in ("s", "m"):
            sets["second question"] = second_questions(sets["chain"], sets["lemma"])
        for profile, asked in sets.items():
            rows.append(_row(model, tokenizer, size, profile, asked))
            print(f"{size:>3} {profile:<15} {rows[-1]['right']}/{count} right", flush=True)
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


def second_questions(firsts: Sequence[Problem], seconds: Sequence[Problem]) -> list[Problem]:
    """Return the second problems, each asked in a conversation in which a first one has been answered."""
    return [
        replace(second, prompt=f"{first.prompt}\n{first.solution} {EOS}\n{second.prompt}")
        for first, second in zip(firsts, seconds, strict=True)
    ]


def _row(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    size: str,
    profile: str,
    problems: Sequence[Problem],
) -> dict[str, Any]:
    started, count = time.perf_counter(), len(problems)
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
