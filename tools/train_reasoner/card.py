"""The model card, and the loss curve of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.train_reasoner.config import TrainConfig

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [reasoning, synthetic, kv-cache]
---

# The longthink reasoner

A Qwen2 model of {parameters} parameters that solves one family of problems by a long chain of thought. It was trained
from scratch to study KV-cache policies: every line of its reasoning looks up values given in the prompt or computed
hundreds or thousands of tokens earlier, every line matters for the answer, and an answer is either right or wrong.
It can do nothing else: it is not a language model, and numbers measured on it show how a policy handles *this* kind
of reuse, not what it does to a general-purpose model.

    cow= bee 47 +cat 08 ; 7 + 8 = 15 ; 4 + 0 + 1 = 05 ; cow: 55

`longthink.reasoner.load_reasoner()` loads it; so do `Qwen2ForCausalLM` and `PreTrainedTokenizerFast` on this folder,
but not `AutoTokenizer`, which turns any `tokenizer.json` of model type qwen2 into Qwen's byte-level tokenizer.

## Accuracy

Held-out problems (test split, first seed {seed}), decoding {decoding}, {evaluated}.
Right: the final answer is right; exact: so is every token of the chain of thought. *Second question*: a lemma problem
in a conversation, behind a chain problem of the same size and its answer; names that both use have two values.

{table}

Reproduce: `python -m tools.train_reasoner evaluate` in a checkout (`evaluation.json` has the numbers).

## Training

{tokens} tokens in {steps} steps, {minutes} minutes on {hardware}, {date}, Python {python}, torch {torch},
transformers {transformers}. To repeat it, in a checkout:

{commands}

Problems get longer as the model masters them, and in half of the rows there is a random gap of positions between
prompt and chain of thought, so that the model cannot look up by distance. `training.json` has all settings.
{turns}Training problems come from the train split, by a stable hash of the prompt's text: none is in the table above.
The initial weights (shared name vectors, heads that look one and two tokens back, a head that matches names) are
documented in `tools/train_reasoner/initial.py`.

## Limits

Programs of 2 to {last_ops} lines, 104 names, arithmetic modulo 100, at most 4,096 tokens. Other text is noise to it.
"""


def write_card(folder: Path) -> None:
    """Write ``README.md`` from ``training.json`` and ``evaluation.json`` in the same folder."""
    training = json.loads((folder / "training.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    stages = [*training["run"]["before"], {"config": training["config"], "run": training["run"]}]
    tokens, steps, seconds = (
        sum(stage["run"][key] for stage in stages) for key in ("tokens", "step", "seconds")
    )
    text = _CARD.format(
        parameters=f"{training['parameters']:,}",
        seed=f"{evaluation['seed']:,}",
        decoding=evaluation["decoding"],
        evaluated=evaluation["date"],
        table=_table(evaluation["rows"]),
        tokens=f"{tokens:,}",
        steps=f"{steps:,}",
        minutes=round(seconds / 60),
        hardware=training["hardware"],
        date=training["date"],
        commands=_commands([stage["config"] for stage in stages]),
        last_ops=training["config"]["last_ops"],
        turns=_turns(training["config"].get("turns_share", 0.0)),
        **training["versions"],
    )
    (folder / "README.md").write_text(text)


def _turns(share: float) -> str:
    if not share:
        return ""
    return f"Of the batches of the last run {share:.0%} are conversations of two or three short problems.\n"


def _commands(configs: list[dict[str, Any]]) -> str:
    """Return the commands of the runs, each of which started with the weights of the one before."""
    defaults, lines = TrainConfig().to_dict(), []
    for number, config in enumerate(configs, 1):
        options = [f"--start run{number - 1}"] if number > 1 else []
        options += [
            f"--{name.replace('_', '-')} {value}" for name, value in config.items() if value != defaults[name]
        ]
        lines.append(" ".join(["    python -m tools.train_reasoner train", f"run{number}", *options]))
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| size | profile | problems | right | 95 % interval | exact |", "|---|---|---|---|---|---|"]
    for row in rows:
        right, exact = (f"{100 * row[key] / row['problems']:.1f} %" for key in ("right", "every_token_right"))
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f} %"
        cells = (row["size"], row["profile"], str(row["problems"]), right, interval, exact)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_curve(metrics: Path, target: Path) -> None:
    """Draw loss and longest problem against tokens, from a run's ``metrics.jsonl``, as a PNG.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    tokens = [record["tokens"] / 1e6 for record in records]
    figure = Figure(figsize=(7, 4), layout="constrained")
    loss = figure.subplots()
    loss.semilogy(tokens, [record["loss"] for record in records], color="C0", linewidth=0.8)
    loss.set_xlabel("tokens (millions)")
    loss.set_ylabel("loss of the batch", color="C0")
    longest = loss.twinx()
    longest.step(tokens, [record["longest"] for record in records], color="C1", where="post")
    longest.set_ylabel("longest problem (lines)", color="C1")
    figure.savefig(target, dpi=150)
