"""The reasoning task: straight-line programs, computed digit by digit.

A prompt has facts, rules and a query; its last token requests the brief or the checked chain of thought::

    bee: 47
    cat: 08
    cow= bee +cat
    ? cow
    #

The solution has one line per rule, which looks up the operands, adds or subtracts digit by digit (low digit first;
the leading digit of a partial result is the carry or borrow) and states the value, modulo 100::

    cow= bee 47 +cat 08 ; 7 + 8 = 15 ; 4 + 0 + 1 = 05 ; cow: 55

A brief line has 22 tokens; a checked line computes the two digits twice and has 38.

Problems are split by a stable hash of their text, so no problem of the test split can occur in training, whatever the
seeds. This module is pure Python.
"""

import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from longthink.config import check_choice, check_flag, check_int
from longthink.reasoner.profiles import PROFILES, Bench, operands
from longthink.reasoner.vocabulary import BRIEF, CHECKED, EOS, NAMES, PAD

SPLITS = ("train", "test")
MIN_LIVE, MAX_LIVE = 3, 8  # fewest and most live values of the chain of a program
MIN_OPS, MAX_OPS = 2, len(NAMES) - MAX_LIVE
"""Fewest and most lines of a program: every line needs its own name."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The length of a problem: ``ops`` lines, brief or checked."""

    ops: int
    checked: bool = False

    def __post_init__(self) -> None:
        check_int("ops", self.ops, MIN_OPS, MAX_OPS)
        check_flag("checked", self.checked)


SIZES: dict[str, Size] = {
    "s": Size(ops=9),
    "m": Size(ops=20),
    "l": Size(ops=40),
    "xl": Size(ops=78, checked=True),
}
"""Chains of thought of about 200, 440, 880 and 2,970 tokens."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    name: str
    left: str
    op: str
    right: str

    def __str__(self) -> str:
        return f"{self.name}= {self.left} {self.op}{self.right}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem (``prompt``) and its worked ``solution``, whose last line gives ``query`` the value ``answer``.

    ``profile``, ``size`` and ``split`` are as in `make_problem`; other lengths than :data:`SIZES` have the number of
    lines. ``facts`` are in prompt order, distractors included; line ``i`` of the solution computes ``rules[i]``.
    """

    prompt: str
    solution: str
    answer: str
    query: str
    profile: str
    size: str
    split: str
    facts: tuple[str, ...]
    rules: tuple[Rule, ...]
    values: Mapping[str, int] = field(hash=False)


def make_problem(
    *,
    profile: str, size: str | Size = "l", seed: int, split: str = "test", live: int = 6, distractors: int = 0,
) -> Problem:  # fmt: skip
    """Make one problem; the same arguments always make the same one.

    Parameters
    ----------
    profile, size
        Reuse profile, a key of `PROFILES`; a key of `SIZES`, or any `Size`.
    split
        ``"test"`` for evaluation or ``"train"`` for training; no problem is in both.
    live
        Live values of the chain.
    distractors
        Most facts in the prompt that no rule reads; fewer if names run out.
    """
    check_choice("profile", profile, PROFILES)
    check_choice("split", split, SPLITS)
    check_int("seed", seed, 0)
    check_int("live", live, MIN_LIVE, MAX_LIVE)
    check_int("distractors", distractors, 0)
    if not isinstance(size, Size):
        check_choice("size", size, SIZES)
        size = SIZES[size]
    # A text seed is hashed by SHA-512: the same on every machine and in every process.
    rng = random.Random(f"{profile}/{size.ops}/{size.checked}/{split}/{live}/{distractors}/{seed}")
    return draw_problem(rng, profile=profile, size=size, split=split, live=live, distractors=distractors)


def make_problems(
    n: int, *, profile: str, size: str | Size = "l", seed: int, split: str = "test", live: int = 6,
    distractors: int = 0,
) -> list[Problem]:  # fmt: skip
    """Make ``n`` problems, with seeds ``seed`` to ``seed + n - 1``; see `make_problem`."""
    check_int("n", n, 0)
    return [
        make_problem(
            profile=profile, size=size, seed=seed + i, split=split, live=live, distractors=distractors
        )
        for i in range(n)
    ]


def grade(problem: Problem, text: str) -> bool:
    """Return whether ``text``, the output of the model after the prompt, ends with the right answer.

    Its last words must be ``query: NN``, followed only by the end token and padding.
    """
    return final_value(text) == f"{problem.query}: {problem.answer}"


def final_value(text: str) -> str | None:
    """The last two words of a text (before end token and padding) if they state a value (``cow: 55``)."""
    words = text.split()
    while words and words[-1] in (EOS, PAD):
        words.pop()
    stated = " ".join(words[-2:])
    return stated if re.fullmatch(r"[a-z]+: [0-9]{2}", stated) else None


def digit_work(op: str, left: int, right: int) -> str:
    """The two digit sums of ``left op right``, low digit first: ``7 + 8 = 15 ; 4 + 0 + 1 = 05``."""
    (x1, x0), (y1, y0) = divmod(left, 10), divmod(right, 10)
    sign = 1 if op == "+" else -1
    low = x0 + sign * y0
    carry = int(not 0 <= low <= 9)
    high = x1 + sign * (y1 + carry)
    # A negative difference borrows a ten and gets a leading 1: "3 - 8 = 15" means "5, borrow 1".
    low, high = (value + 20 if value < 0 else value for value in (low, high))
    return f"{x0} {op} {y0} = {low:02d} ; {x1} {op} {y1} {op} {carry} = {high:02d}"


def solution_line(rule: Rule, values: Mapping[str, int], *, checked: bool) -> str:
    left, right = values[rule.left], values[rule.right]
    work = digit_work(rule.op, left, right)
    if checked:
        work = f"{work} ; check ; {work}"
    operands = f"{rule.left} {left:02d} {rule.op}{rule.right} {right:02d}"
    return f"{rule.name}= {operands} ; {work} ; {rule.name}: {values[rule.name]:02d}"


def split_of(program: str) -> str:
    """Split of a prompt: one in eight hashes is ``test``. Brief and checked forms of a program share a split."""
    text = program.rsplit(maxsplit=1)[0]
    return "test" if hashlib.sha256(text.encode()).digest()[0] % 8 == 0 else "train"


def draw_problem(
    rng: random.Random, *, profile: str, size: Size, split: str, live: int = 6, distractors: int = 0
) -> Problem:
    """Draw problems from ``rng`` until one is in ``split`` (arguments are not checked)."""
    while True:
        problem = _draw(rng, profile, size, live, distractors)
        if problem.split == split:
            return problem


def _draw(rng: random.Random, profile: str, size: Size, live: int, distractors: int) -> Problem:
    bench = Bench(rng, size.ops, live)
    values: dict[str, int] = {}
    rules = []
    for first, second in operands(bench, profile):
        left, right = (first, second) if rng.random() < 0.5 else (second, first)
        for name in (left, right):
            if name not in bench.results:
                values.setdefault(name, rng.randrange(100))
        op = rng.choice("+-")
        rule = Rule(name=bench.finish_line(left, right), left=left, op=op, right=right)
        values[rule.name] = (values[left] + (values[right] if op == "+" else -values[right])) % 100
        rules.append(rule)
    for _ in range(min(distractors, bench.spare_facts)):
        bench.new_fact()
    for name in bench.facts:
        values.setdefault(name, rng.randrange(100))
    rng.shuffle(bench.facts)
    return _problem(profile, size, tuple(bench.facts), tuple(rules), values)


def _problem(
    profile: str, size: Size, facts: tuple[str, ...], rules: tuple[Rule, ...], values: Mapping[str, int]
) -> Problem:
    query = rules[-1].name
    lines = [f"{name}: {values[name]:02d}" for name in facts] + [str(rule) for rule in rules] + [f"? {query}"]
    prompt = "\n".join([*lines, CHECKED if size.checked else BRIEF])
    return Problem(
        prompt=prompt,
        solution="\n".join(solution_line(rule, values, checked=size.checked) for rule in rules),
        answer=f"{values[query]:02d}", query=query, profile=profile,
        size=next((name for name, known in SIZES.items() if known == size), str(size.ops)),
        split=split_of(prompt), facts=facts, rules=rules, values=values,
    )  # fmt: skip
