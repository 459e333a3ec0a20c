"""Tasks: named problem sets with their prompts, from the Hub, from files and from the built-in task."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longthink.config import check_choice, check_int
from longthink.errors import DataError, needs_extra
from longthink.lab.evaluate import facts
from longthink.lab.evaluate.files import Fields, Item, read_file, to_items
from longthink.reasoner.profiles import PROFILES
from longthink.reasoner.task import SIZES, make_problem


class Source(NamedTuple):
    """A problem set on the Hub: arguments of ``load_dataset``, its columns, and the default token limit."""

    dataset: str
    config: str | None
    split: str
    fields: Fields
    max_new_tokens: int


SOURCES: dict[str, Source] = {
    "gsm8k": Source("openai/gsm8k", "main", "test", Fields("question", "answer", None), 8192),
    "math500": Source(
        "HuggingFaceH4/MATH-500", None, "test", Fields("problem", "answer", "unique_id"), 16384
    ),
    "aime24": Source("HuggingFaceH4/aime_2024", None, "train", Fields("problem", "answer", "id"), 32768),
    "aime25": Source("math-ai/aime25", None, "test", Fields("problem", "answer", "id"), 32768),
    # 1983 to 2024, the same set as in lm-evaluation-harness
    "aime": Source("gneubig/aime-1983-2024", None, "train", Fields("Question", "Answer", "ID"), 32768),
}


def read_hub(name: str) -> list[Item]:
    source = SOURCES[name]
    with needs_extra("eval"):
        from datasets import load_dataset
    where = f"task {name!r}, data set {source.dataset}"
    try:
        table = load_dataset(source.dataset, source.config, split=source.split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "(or give a copy: --data FILE.jsonl or FILE.parquet)"
        raise DataError(f"{where} cannot be loaded: {reason} {remedy}") from error
    records = ((f"{where}, row {number}", record) for number, record in enumerate(table, 1))
    return to_items(records, name, source.fields)


INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
BUILTIN = "reasoner"  # first part of the names of the built-in tasks
FACT = "fact"  # and of those that give the model a text
DEFAULT_SIZE = "m"
FILE_MAX_NEW_TOKENS = 32768  # default token limit for problem files, about which nothing is known

_MAX_SEED = 10**9
# Slightly more than the worked solution: a model that does not stop is wrong, and the limit must show it.
_SPARE_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Task:
    """The chosen problems of a set, and the default token limit of an answer, which does not depend on the choice."""

    name: str
    items: Sequence[Item]
    max_new_tokens: int


def prompt_text(item: Item, tokenizer: Any) -> str:
    """Return the prompt, in the chat template if there is one and the problem is not built in.

    Problems from files and from the Hub are followed by the instruction.
    """
    return item.question if item.is_builtin else _templated(_asked(item), tokenizer)


def prompt_ids(item: Item, tokenizer: Any) -> list[int]:
    """Return the tokens of the prompt."""
    if item.is_builtin:
        ids: list[int] = tokenizer(item.question)["input_ids"]
        return ids
    return _templated_ids(_asked(item), tokenizer)


def question_ids(question: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a question with the instruction."""
    return _templated_ids(f"{question}\n\n{INSTRUCTION}", tokenizer)


def _asked(item: Item) -> str:
    return item.question if item.distance is not None else f"{item.question}\n\n{INSTRUCTION}"


def _templated_ids(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a prompt; a chat template brings its own special tokens."""
    templated = bool(tokenizer.chat_template)
    ids: list[int] = tokenizer(_templated(text, tokenizer), add_special_tokens=not templated)["input_ids"]
    return ids


def _templated(text: str, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return text
    chat = [{"role": "user", "content": text}]
    asked: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return asked


def load_tasks(
    names: Sequence[str], *, data: Sequence[Path] = (), count: int | None = None, choose: str = "first",
    seed: int = 0, given: bool = False,
) -> list[Task]:  # fmt: skip
    """Load problem sets by name; docs/tasks.md lists them.

    Each file in `data` is a task named by its stem and replaces a set of that name on the Hub; files that `names`
    does not mention come last. `count` limits the problems of a task; built-in tasks are endless and require it.
    `choose` is ``first``, or ``random`` by `seed` (a larger count extends the choice of a smaller one); problems that
    are made take consecutive seeds from `seed`, or random ones. `given` says that the caller can give a model the
    text of its own side, which the task ``fact`` needs.
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
    if not given and (refused := [name for name in wanted if name not in files and _is_fact(name)]):
        raise ValueError(
            f"task {refused[0]!r} gives the model a text to go on from: only longthink eval runs it"
        )
    return [_load(name, files, count, choose, seed) for name in wanted]


def _known(files: Iterable[str]) -> str:
    return ", ".join([*files, *SOURCES, f"{BUILTIN}[/size[/profile]]", f"{FACT}[/distance]"])


def _is_fact(name: str) -> bool:
    return name.split("/")[0] == FACT


def _expand(name: str, files: dict[str, Path]) -> list[str]:
    if name in files or name in SOURCES:
        return [name]
    first, *rest = name.split("/")
    if first == FACT and len(rest) <= 1:
        return [f"{FACT}/{distance}" for distance in (_distances(name, rest[0]) if rest else facts.DISTANCES)]
    if first != BUILTIN or len(rest) > 2:
        raise ValueError(f"task={name!r} is unknown: allowed are {_known(files)}")
    size = rest[0] if rest else DEFAULT_SIZE
    check_choice(f"size of task {name!r}", size, SIZES)
    profiles = rest[1:] or list(PROFILES)
    for profile in profiles:
        check_choice(f"profile of task {name!r}", profile, PROFILES)
    return [f"{BUILTIN}/{size}/{profile}" for profile in profiles]


def _distances(name: str, text: str) -> list[int]:
    if not text.isdecimal():
        fault = f"is not a number: allowed are {facts.SHORTEST} to {facts.LONGEST} tokens"
        raise ValueError(f"distance of task {name!r}={text!r} {fault}")
    check_int(f"distance of task {name!r}", int(text), facts.SHORTEST, facts.LONGEST)
    return [int(text)]


def _load(name: str, files: dict[str, Path], count: int | None, choose: str, seed: int) -> Task:
    if name not in files and name not in SOURCES:
        if count is None:
            raise ValueError(f"task {name!r} is endless: give a count (count=None is not a number)")
        return (_fact if _is_fact(name) else _builtin)(name, count, choose, seed)
    items = read_file(files[name]) if name in files else read_hub(name)
    if choose == "random":
        items = random.Random(f"{name}/{seed}").sample(items, len(items))
    limit = SOURCES[name].max_new_tokens if name in SOURCES else FILE_MAX_NEW_TOKENS
    return Task(name=name, items=items[:count], max_new_tokens=limit)


def _numbers(name: str, count: int, choose: str, seed: int) -> list[int]:
    """Seeds of problems that are made."""
    if choose == "first":
        return [*range(seed, seed + count)]
    rng, found = random.Random(f"{name}/{seed}"), dict[int, None]()
    while len(found) < count:
        found[rng.randrange(_MAX_SEED)] = None
    return list(found)


def _fact(name: str, count: int, choose: str, seed: int) -> Task:
    distance = int(name.split("/")[1])
    # A number is the same fact at every distance.
    items = [
        Item(task=name, id=str(number), question=facts.PROMPT, gold=facts.make_fact(number).value, distance=distance)
        for number in _numbers(FACT, count, choose, seed)
    ]  # fmt: skip
    return Task(name=name, items=items, max_new_tokens=facts.MAX_NEW_TOKENS)


def _builtin(name: str, count: int, choose: str, seed: int) -> Task:
    _, size, profile = name.split("/")
    items = []
    for number in _numbers(name, count, choose, seed):
        problem = make_problem(profile=profile, size=size, seed=number)
        gold, steps = f"{problem.query}: {problem.answer}", len(problem.solution.split())
        items.append(Item(task=name, id=str(number), question=problem.prompt, gold=gold, steps=steps))
    # All solutions of a size have the same number of tokens.
    longest = max(item.steps or 0 for item in items)
    return Task(name=name, items=items, max_new_tokens=longest + _SPARE_TOKENS)
