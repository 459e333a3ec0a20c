"""Tasks: named problem sets with their prompts, from the Hub, from files and from the built-in task."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longthink.config import check_choice, check_int
from longthink.errors import DataError
from longthink.lab.evaluate.files import Row, read_file
from longthink.lab.evaluate.hub import SOURCES, read_hub
from longthink.reasoner.profiles import PROFILES
from longthink.reasoner.task import SIZES, make_problem

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
"""What a problem is followed by."""
BUILTIN = "reasoner"
"""First part of the names of the built-in tasks."""
DEFAULT_SIZE = "m"
FILE_MAX_NEW_TOKENS = 32768
"""Default limit for problems from a file of no known name: nothing is known about them."""

_MAX_SEED = 10**9
# A few tokens more than the worked solution has: a model that does not stop is wrong, and should be seen to be.
_SPARE_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Item:
    """One problem.

    Attributes
    ----------
    task
        Name of its task.
    id
        Identifier within the task: its own; the beginning of a hash of the question where it has none; the problem's
        seed in built-in tasks.
    question
        What is asked; for built-in tasks the whole prompt.
    gold
        The right final answer; for built-in tasks the words that state it, such as ``cow: 55``.
    steps
        Tokens of the worked solution of a built-in task, else None.
    """

    task: str
    id: str
    question: str
    gold: str
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A problem set, ready to be asked.

    Attributes
    ----------
    name
        Such as ``gsm8k`` or ``reasoner/l/chain``.
    items
        The problems chosen.
    max_new_tokens
        Tokens that an answer may have, unless the user says otherwise. Does not depend on the choice of problems.
    grading
        ``math`` (by mathematical equality) or ``exact`` (built-in tasks).
    """

    name: str
    items: Sequence[Item]
    max_new_tokens: int
    grading: Literal["math", "exact"]

    def prompt(self, item: Item, tokenizer: Any) -> str:
        """Return the text that a model is given.

        A problem is followed by the instruction to box the answer, in the tokenizer's chat template where there is
        one. A built-in problem stays as it is.
        """
        if self.grading == "exact":
            return item.question
        text = f"{item.question}\n\n{INSTRUCTION}"
        if not tokenizer.chat_template:
            return text
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )

    def prompt_ids(self, item: Item, tokenizer: Any) -> list[int]:
        """Return the tokens of the prompt; a chat template brings its own special tokens, so none are added twice."""
        templated = self.grading == "math" and bool(tokenizer.chat_template)
        ids: list[int] = tokenizer(self.prompt(item, tokenizer), add_special_tokens=not templated)[
            "input_ids"
        ]
        return ids


def load_tasks(
    names: Sequence[str],
    *,
    data: Sequence[Path] = (),
    count: int | None = None,
    choose: str = "first",
    seed: int = 0,
) -> list[Task]:
    """Load problem sets by name.

    Parameters
    ----------
    names
        ``gsm8k``, ``math500``, ``aime24``, ``aime25``, ``aime`` (1983 to 2024), ``reasoner/<size>/<profile>``
        (``reasoner/<size>``: all profiles; ``reasoner``: size m), or the stem of a file in `data`.
    data
        Problem files (``.jsonl``, ``.parquet``). Each is a task named by its stem, in place of a set of that name on
        the Hub; those that `names` does not name come last.
    count
        Problems of each task, at most; None takes all. Built-in tasks have no end and need a number.
    choose
        ``first``, or ``random`` (by `seed`; a larger count adds problems to those of a smaller one).
    seed
        Seed of the random choice. Built-in problems are made with seeds from here on, or with random ones.

    Raises
    ------
    ValueError
        If a name is unknown, no task is named, or a number is out of range.
    DataError
        If a file or a set from the Hub cannot be used.
    OSError
        If a file cannot be read.
    """
    check_choice("choose", choose, ("first", "random"))
    check_int("seed", seed, 0)
    if count is not None:
        check_int("count", count, 1)
    files: dict[str, Path] = {}
    for path in map(Path, data):
        if path.stem in files:
            raise DataError(f"{files[path.stem]} and {path} would both be task {path.stem!r}: rename one")
        files[path.stem] = path
    wanted = dict.fromkeys([*(full for name in names for full in _expand(name, files)), *files])
    if not wanted:
        raise ValueError(f"tasks is empty: name at least one of {_known(files)}, or give a problem file")
    return [_load(name, files, count, choose, seed) for name in wanted]


def _known(files: Iterable[str]) -> str:
    return ", ".join([*files, *SOURCES, f"{BUILTIN}[/size[/profile]]"])


def _expand(name: str, files: dict[str, Path]) -> list[str]:
    """Return the full names that a short one stands for."""
    if name in files or name in SOURCES:
        return [name]
    first, *rest = name.split("/")
    if first != BUILTIN or len(rest) > 2:
        raise ValueError(f"task={name!r} is unknown: allowed are {_known(files)}")
    size = rest[0] if rest else DEFAULT_SIZE
    check_choice(f"size of task {name!r}", size, SIZES)
    profiles = rest[1:] or list(PROFILES)
    for profile in profiles:
        check_choice(f"profile of task {name!r}", profile, PROFILES)
    return [f"{BUILTIN}/{size}/{profile}" for profile in profiles]


def _load(name: str, files: dict[str, Path], count: int | None, choose: str, seed: int) -> Task:
    if name not in files and name not in SOURCES:
        return _builtin(name, count, choose, seed)
    rows = read_file(files[name]) if name in files else read_hub(name)
    return Task(
        name=name,
        items=[
            Item(task=name, id=row.id, question=row.question, gold=row.gold)
            for row in _choose(rows, count, choose, f"{name}/{seed}")
        ],
        max_new_tokens=SOURCES[name].max_new_tokens if name in SOURCES else FILE_MAX_NEW_TOKENS,
        grading="math",
    )


def _choose(rows: list[Row], count: int | None, choose: str, seed: str) -> list[Row]:
    if choose == "random":
        rows = random.Random(seed).sample(rows, len(rows))
    return rows[:count]


def _builtin(name: str, count: int | None, choose: str, seed: int) -> Task:
    if count is None:
        raise ValueError(
            f"task {name!r} makes as many problems as are asked for: give a count (count=None is no number)"
        )
    _, size, profile = name.split("/")
    rng = random.Random(f"{name}/{seed}")
    items: dict[int, Item] = {}
    while len(items) < count:
        number = rng.randrange(_MAX_SEED) if choose == "random" else seed + len(items)
        problem = make_problem(profile=profile, size=size, seed=number)
        items[number] = Item(
            task=name,
            id=str(number),
            question=problem.prompt,
            gold=f"{problem.query}: {problem.answer}",
            steps=len(problem.solution.split()),
        )
    # All solutions of a size have the same number of tokens.
    longest = max(item.steps or 0 for item in items.values())
    return Task(
        name=name, items=list(items.values()), max_new_tokens=longest + _SPARE_TOKENS, grading="exact"
    )
