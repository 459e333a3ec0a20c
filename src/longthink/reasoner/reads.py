"""Which tokens of a problem its solution reads, and when: the ground truth for an analysis of attention.

A line such as ``cow= bee 47 +cat 08 ; ... ; cow: 55`` follows its rule in the prompt, ``cow= bee +cat``, and looks up
the value of ``bee`` after writing ``bee`` and that of ``cat`` after ``+cat``. Its own value is its last token, which
later lines look up. This module is pure Python.
"""

from dataclasses import dataclass

from longthink.reasoner.task import Problem
from longthink.reasoner.vocabulary import BOS


@dataclass(frozen=True, kw_only=True)
class NeededToken:
    """A token that is read again, at a position counted from the start token."""

    kind: str  # fact (a value in the prompt), result (of a line) or rule (one of its three tokens)
    position: int
    reads: tuple[int, ...]  # positions of the tokens that look it up; each is followed by the value


def needed_tokens(problem: Problem) -> list[NeededToken]:
    """Tokens that the solution reads again, in order of position."""
    prompt, solution = [BOS, *problem.prompt.split()], problem.solution.split()
    line = len(solution) // len(problem.rules)
    starts = {rule.name: len(prompt) + i * line for i, rule in enumerate(problem.rules)}
    held = {name: ("fact", prompt.index(f"{name}:") + 1) for name in problem.facts}
    held |= {name: ("result", start + line - 1) for name, start in starts.items()}
    reads: dict[str, list[int]] = {name: [] for name in held}
    found = []
    for rule in problem.rules:
        start = starts[rule.name]
        reads[rule.left].append(start + 1)
        reads[rule.right].append(start + 3)
        # The three tokens of a rule determine the head and the two operands of its line.
        place = prompt.index(f"{rule.name}=")
        found += [
            NeededToken(kind="rule", position=place + i, reads=(start + offset,))
            for i, offset in enumerate((-1, 0, 2))
        ]
    found += [
        NeededToken(kind=kind, position=position, reads=tuple(reads[name]))
        for name, (kind, position) in held.items()
        if reads[name]
    ]
    return sorted(found, key=lambda token: token.position)
