"""Training batches: programs of all profiles from the train split, conversations of them, and pure look-up sequences.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longthink.reasoner.profiles import PROFILES
from longthink.reasoner.task import MAX_LIVE, MIN_LIVE, MIN_OPS, Size, draw_problem
from longthink.reasoner.vocabulary import BOS, BRIEF, EOS, FORMS, NAMES, TOKEN_IDS, token_ids
from tools.train_reasoner.architecture import MAX_TOKENS
from tools.train_reasoner.config import TrainConfig

IGNORE = -100
KINDS = ("head", "operand", "value", "digits", "result")
"""The kinds of token whose accuracy is tracked; separators are not tracked."""
_HEAD, _OPERAND, _VALUE, _DIGITS, _RESULT = range(5)
_FREE = -1
_WORK = [_DIGITS] * 13
_OPERANDS = [_HEAD, _OPERAND, _VALUE, _OPERAND, _VALUE, _FREE]
BRIEF_LINE = [*_OPERANDS, *_WORK, _FREE, _RESULT, _RESULT]
CHECKED_LINE = [*_OPERANDS, *_WORK, _FREE, _FREE, _FREE, *_WORK, _FREE, _RESULT, _RESULT]
RECALL_UP_TO = 12
"""Look-up batches are mixed in while the longest problem has at most this many lines."""

GAP_SHARE = 0.5
"""Share of the rows with a random gap of positions between the prompt and the chain of thought.

Short problems then show every distance of the longest ones. Without it the model looks up by distance, and fails each
time problems get longer.
"""


@dataclass(frozen=True)
class Batch:
    """The data of a training step, each ``[B, T]``; `kinds` are those of the targets."""

    ids: Tensor
    positions: Tensor
    targets: Tensor
    kinds: Tensor


class _Row(NamedTuple):
    ids: list[int]
    targets: list[int]
    kinds: list[int]
    thoughts: list[int]
    """Where each chain of thought begins."""


def draw_batch(config: TrainConfig, step: int, longest: int) -> tuple[Batch, int]:
    """Return the batch of a step and the lines of its problems (0: look-ups or conversations).

    It depends only on the arguments, so a resumed run gets the same batches.
    """
    rng = random.Random(f"{config.seed}/{step}")
    if longest <= RECALL_UP_TO and rng.random() < config.recall_share:
        return _recall_batch(config, rng), 0
    # Without conversations nothing is drawn, so the batches of earlier runs stay what they were.
    if config.turns_share and rng.random() < config.turns_share:
        return _conversation_batch(config, rng), 0
    ops = longest if rng.random() < config.longest_share else rng.randint(2, longest)
    return _program_batch(config, rng, ops, longest), ops


def _program_batch(config: TrainConfig, rng: random.Random, ops: int, longest: int) -> Batch:
    # The longest problems are mostly checked, like those of size xl.
    size = Size(ops=ops, checked=rng.random() < (0.6 if ops > 60 else 0.25))
    count = max(1, round(config.batch_tokens / ((len(_line(size)) + 6) * ops + 24)))
    return _pack([_program(rng, size, longest) for _ in range(count)], rng)


def _line(size: Size) -> list[int]:
    return CHECKED_LINE if size.checked else BRIEF_LINE


def _program(rng: random.Random, size: Size, longest: int) -> _Row:
    problem = draw_problem(
        rng,
        profile=rng.choice(list(PROFILES)),
        size=size,
        split="train",
        # As many live values as in the longest problems, so that short ones prepare for them.
        live=rng.randint(MIN_LIVE, min(MAX_LIVE, MIN_LIVE + longest // 2)),
        distractors=rng.choice((0, 0, 0, rng.randrange(2 * longest))),
    )
    prompt = [TOKEN_IDS[BOS], *token_ids(problem.prompt)]
    thought = [*token_ids(problem.solution), TOKEN_IDS[EOS]]
    kinds = [_FREE] * len(prompt) + _line(size) * size.ops + [_FREE]
    return _Row(prompt + thought, [IGNORE] * len(prompt) + thought, kinds, [len(prompt)])


def _conversation_batch(config: TrainConfig, rng: random.Random) -> Batch:
    """Return conversations of two or three problems, which give other values to names that they share."""
    rows = [_conversation(config, rng)]
    while sum(len(row.ids) for row in rows) < config.batch_tokens:
        rows.append(_conversation(config, rng))
    return _pack(rows, rng)


def _conversation(config: TrainConfig, rng: random.Random) -> _Row:
    turns = rng.choice((2, 2, 3))
    row = _Row([], [], [], [])
    for turn in range(turns):
        ops = rng.randint(MIN_OPS, config.turns_ops // turns)
        more = _program(rng, Size(ops=ops, checked=rng.random() < 0.1), ops)
        # A later question may come with the token that begins a text or, as a chat sends it, without.
        start = int(turn > 0 and rng.random() < 0.5)
        row.thoughts.append(len(row.ids) + more.thoughts[0] - start)
        for whole, part in zip(row[:3], more[:3], strict=True):
            whole.extend(part[start:])
    return row


def _recall_batch(config: TrainConfig, rng: random.Random) -> Batch:
    """Return a few facts, followed by many look-ups: ``bee: 47 ... # +bee 47 cat 08 ...``."""
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
        kinds = [_FREE] * (len(prompt) + len(tail))
        rows.append(_Row(prompt + tail, [IGNORE] * len(prompt) + targets, kinds, [len(prompt)]))
    return _pack(rows, rng)


def _pack(rows: list[_Row], rng: random.Random) -> Batch:
    """Right-pad the rows and shift the targets by one token."""
    # Lengths are rounded up to limit the number of shapes.
    length = -(-max(len(row.ids) for row in rows) // 32) * 32 + 1
    ids, targets, kinds = (
        torch.tensor([values + [fill] * (length - len(values)) for values in column])
        for column, fill in zip(zip(*(row[:3] for row in rows), strict=True), (0, IGNORE, _FREE), strict=True)
    )
    positions = torch.arange(length - 1).repeat(len(rows), 1)
    for row, own in zip(rows, positions, strict=True):
        for start in row.thoughts:
            if rng.random() < GAP_SHARE:
                own[start:] += rng.randrange(MAX_TOKENS - 2 - int(own[-1]))
    return Batch(ids[:, :-1].contiguous(), positions, targets[:, 1:].contiguous(), kinds[:, 1:].contiguous())
