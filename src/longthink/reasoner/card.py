"""The model card, written from the facts beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longthink.reasoner.config import TrainConfig

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [reasoning, synthetic, kv-cache]
---

# The longthink reasoner

A Qwen2 model of {parameters} parameters that solves one family of problems by a long chain of thought. It was trained
from scratch to study KV-cache policies: every line of its reasoning looks up values that stand in the prompt or were
worked out hundreds or thousands of tokens ago, every line bears on the answer, and an answer is right or wrong.
It knows nothing else: it is no language model, and numbers measured on it say how a policy treats *this* kind of
reuse, not what it does to a model that people talk to.

    cow= bee 47 +cat 08 ; 7 + 8 = 15 ; 4 + 0 + 1 = 05 ; cow: 55

`longthink.reasoner.load_reasoner()` loads it; so do `Qwen2ForCausalLM` and `PreTrainedTokenizerFast` on this folder,
but not `AutoTokenizer`: for the model type qwen2 it makes Qwen's byte-level tokenizer of any `tokenizer.json`.

## Accuracy

Held-out problems (test split, first seed {seed}), decoding {decoding}, {evaluated}.
Right: the final answer is right; exact: every token of the chain of thought is right too.

{table}

Reproduce: `python -m longthink.reasoner.evaluate` (`evaluation.json` has the numbers).

## Training

{tokens} tokens in {steps} steps, {minutes} minutes on {hardware}, {date}, Python {python}, torch {torch},
transformers {transformers}. The same again:

{commands}

Problems get longer as the model masters them, and in half of the rows the chain of thought stands any number of
positions behind the prompt, so that look-ups do not go by distance. `training.json` has all settings.
Training problems come from the train split, a stable hash of the prompt's text: none is in the table above.
What the initial weights contain (shared name vectors, heads that look one and two tokens back, a head that matches
names) is documented in `longthink/reasoner/initial.py`.

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
        **training["versions"],
    )
    (folder / "README.md").write_text(text)


def _commands(configs: list[dict[str, Any]]) -> str:
    """Return the commands that made the runs, one going on with the weights of the other."""
    defaults, lines = TrainConfig().to_dict(), []
    for number, config in enumerate(configs, 1):
        options = [f"--start run{number - 1}"] if number > 1 else []
        options += [
            f"--{name.replace('_', '-')} {value}" for name, value in config.items() if value != defaults[name]
        ]
        lines.append(" ".join(["    longthink reasoner train", f"run{number}", *options]))
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| size | profile | problems | right | 95 % interval | exact |", "|---|---|---|---|---|---|"]
    for row in rows:
        right, exact = (f"{100 * row[key] / row['problems']:.1f} %" for key in ("right", "every_token_right"))
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f} %"
        cells = (row["size"], row["profile"], str(row["problems"]), right, interval, exact)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
