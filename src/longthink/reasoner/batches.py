"""Training batches: programs of all profiles from the train split, and pure look-up sequences.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from longthink.reasoner.config import TrainConfig
from longthink.reasoner.profiles import PROFILES
from longthink.reasoner.task import MAX_LIVE, MIN_LIVE, Size, draw_problem
from longthink.reasoner.vocabulary import BOS, BRIEF, EOS, FORMS, NAMES, TOKEN_IDS, token_ids

IGNORE = -100
KINDS = ("head", "operand", "value", "digits", "result")
"""The kinds of token of a line whose accuracy is followed apart; separators are not followed."""
_HEAD, _OPERAND, _VALUE, _DIGITS, _RESULT = range(5)
_FREE = -1
_WORK = [_DIGITS] * 13
_OPERANDS = [_HEAD, _OPERAND, _VALUE, _OPERAND, _VALUE, _FREE]
BRIEF_LINE = [*_OPERANDS, *_WORK, _FREE, _RESULT, _RESULT]
CHECKED_LINE = [*_OPERANDS, *_WORK, _FREE, _FREE, _FREE, *_WORK, _FREE, _RESULT, _RESULT]
RECALL_UP_TO = 12
"""Look-up batches are mixed in while the longest problem has at most this many lines."""


@dataclass(frozen=True)
class Batch:
    """One training step's data, each ``[B, T]``: inputs, targets (`IGNORE` where none), kind of each target."""

    ids: Tensor
    targets: Tensor
    kinds: Tensor


def draw_batch(config: TrainConfig, step: int, longest: int) -> tuple[Batch, int]:
    """Return the batch of a step and the lines of its problems (0: look-ups).

    It depends on nothing but the arguments, so a resumed run meets the batches it would have met.
    """
    rng = random.Random(f"{config.seed}/{step}")
    if longest <= RECALL_UP_TO and rng.random() < config.recall_share:
        return _recall_batch(config, rng), 0
    ops = longest if rng.random() < config.longest_share else rng.randint(2, longest)
    return _program_batch(config, rng, ops, longest), ops


def _program_batch(config: TrainConfig, rng: random.Random, ops: int, longest: int) -> Batch:
    # The longest problems are mostly met with checking on, in the form of size xl.
    checked = rng.random() < (0.6 if ops > 60 else 0.25)
    line = CHECKED_LINE if checked else BRIEF_LINE
    count = max(1, round(config.batch_tokens / ((len(line) + 6) * ops + 24)))
    rows = []
    for _ in range(count):
        problem = draw_problem(
            rng,
            profile=rng.choice(list(PROFILES)),
            size=Size(ops=ops, checked=checked),
            split="train",
            # As much to look up as the longest problems have, so that short ones prepare for them.
            live=rng.randint(MIN_LIVE, min(MAX_LIVE, MIN_LIVE + longest // 2)),
            distractors=rng.choice((0, 0, 0, rng.randrange(2 * longest))),
        )
        prompt = [TOKEN_IDS[BOS], *token_ids(problem.prompt)]
        thought = [*token_ids(problem.solution), TOKEN_IDS[EOS]]
        rows.append(
            (prompt + thought, [IGNORE] * len(prompt) + thought, [_FREE] * len(prompt) + line * ops + [_FREE])
        )
    return _pack(rows)


def _recall_batch(config: TrainConfig, rng: random.Random) -> Batch:
    """A few facts, then many look-ups of one of them: ``bee: 47 ... # +bee 47 cat 08 ...``."""
    facts = rng.randint(2, 16)
    asks = 2 * facts + 6
    rows = []
    for _ in range(max(1, config.batch_tokens // (2 * facts + 2 * asks + 2))):
        values = {name: f"{rng.randrange(100):02d}" for name in rng.sample(NAMES, facts)}
        given = " ".join(f"{name}: {value}" for name, value in values.items())
        prompt = [TOKEN_IDS[BOS], *token_ids(f"{given} {BRIEF}")]
        asked = rng.choices(list(values), k=asks)
        tail = token_ids(" ".join(f"{rng.choice(FORMS[:3]).format(name)} {values[name]}" for name in asked))
        targets = [token if i % 2 else IGNORE for i, token in enumerate(tail)]
        rows.append((prompt + tail, [IGNORE] * len(prompt) + targets, [_FREE] * (len(prompt) + len(tail))))
    return _pack(rows)


def _pack(rows: list[tuple[list[int], list[int], list[int]]]) -> Batch:
    """Right-pad the rows and shift the targets by one token."""
    # Lengths are rounded up so that few different shapes are met.
    length = -(-max(len(ids) for ids, _, _ in rows) // 32) * 32 + 1
    columns = zip(*rows, strict=True)
    ids, targets, kinds = (
        torch.tensor([row + [fill] * (length - len(row)) for row in column])
        for column, fill in zip(columns, (0, IGNORE, _FREE), strict=True)
    )
    return Batch(ids[:, :-1].contiguous(), targets[:, 1:].contiguous(), kinds[:, 1:].contiguous())
