"""Reuse profiles: which earlier values each line of a program reads.

All profiles produce the same kind of line. They differ only in how long a value is needed and how long it is unread
between two reads, which is what a bounded cache has to cope with.
"""

import random
from collections.abc import Callable, Iterator

from longthink.reasoner.vocabulary import NAMES

FRESH_FACT = 0.15  # share of the chain's operands that are prompt facts not read before


class Bench:
    """The values available while a program is being generated: `ops` lines, a chain `live` values wide."""

    def __init__(self, rng: random.Random, ops: int, live: int) -> None:
        self.rng = rng
        self.ops = ops
        self.width = live
        names = rng.sample(NAMES, len(NAMES))
        self._result_names = names[:ops]
        self._fact_names = names[ops:]
        self.facts: list[str] = []
        self.results: list[str] = []
        self.last_read: dict[str, int] = {}
        self.live = [self.new_fact() for _ in range(live)]

    @property
    def lines_left(self) -> int:
        return self.ops - len(self.results)

    @property
    def unread(self) -> list[str]:
        return [name for name in self.results if name not in self.last_read]

    @property
    def spare_facts(self) -> int:
        return len(self._fact_names) - len(self.facts)

    def new_fact(self) -> str:
        self.facts.append(self._fact_names[len(self.facts)])
        return self.facts[-1]

    def chain_operand(self, *, other: str | None = None) -> str:
        """Return a live value, or sometimes a fresh fact, different from ``other``."""
        if self.spare_facts and self.rng.random() < FRESH_FACT:
            fact = self.new_fact()
            self.keep(fact)
            return fact
        return self.rng.choice([name for name in self.live if name != other])

    def keep(self, name: str) -> None:
        """Make ``name`` live; at full width it replaces a random value that has been read, or any if none has."""
        if len(self.live) < self.width:
            self.live.append(name)
            return
        read = [i for i, other in enumerate(self.live) if other in self.last_read]
        self.live[self.rng.choice(read or range(len(self.live)))] = name

    def finish_line(self, left: str, right: str) -> str:
        """Record that a line reads ``left`` and ``right``; return the name of its result, which is now live."""
        line = len(self.results)
        self.last_read[left] = self.last_read[right] = line
        self.results.append(self._result_names[line])
        self.keep(self.results[-1])
        return self.results[-1]


def chain(bench: Bench) -> Iterator[tuple[str, str]]:
    """Short reuse: each line reads two of a few live values and replaces one."""
    while True:
        first = bench.chain_operand()
        yield first, bench.chain_operand(other=first)


def lemma(bench: Bench) -> Iterator[tuple[str, str]]:
    """Milestones: one result is read by most lines for about a third of the program, then never again."""
    lifetime = max(4, bench.ops // 3)
    yield from _lines(chain(bench), 2)
    while True:
        current = bench.results[-1]
        bench.live.remove(current)
        for _ in range(lifetime):
            first = bench.chain_operand()
            yield first, current if bench.rng.random() < 0.6 else bench.chain_operand(other=first)


def recurrent(bench: Bench) -> Iterator[tuple[str, str]]:
    """Long gaps within the chain of thought: early results are read again in turn, each after a long gap."""
    rest = max(3, bench.ops // 4)
    size = rest // 2 + 1
    yield from _lines(chain(bench), size)
    pool = bench.results[:size]
    while True:
        first = bench.chain_operand()
        line, head = len(bench.results), pool[0]
        rested = line - max(bench.results.index(head), bench.last_read.get(head, 0)) >= rest
        if rested and head != first and bench.rng.random() < 0.5:
            pool.append(pool.pop(0))
            yield first, head
        else:
            yield first, bench.chain_operand(other=first)


def phoenix(bench: Bench) -> Iterator[tuple[str, str]]:
    """Late reads of the prompt: half of the lines read an unread fact, or the one unread for longest."""
    while True:
        first = bench.chain_operand()
        if bench.rng.random() >= 0.5:
            yield first, bench.chain_operand(other=first)
        elif bench.spare_facts and bench.rng.random() < 0.5:
            yield first, bench.new_fact()
        else:
            facts = [name for name in bench.facts if name != first]
            yield first, min(facts, key=lambda name: bench.last_read.get(name, -1))


def operands(bench: Bench, profile: str) -> Iterator[tuple[str, str]]:
    """Yield the operands of each line of a program.

    Under every profile the last few lines read the results that are still unread: every line contributes to the
    answer, so a wrong look-up anywhere makes the answer wrong.
    """
    pairs = PROFILES[profile](bench)
    while bench.lines_left:
        unread = bench.unread
        if bench.lines_left > len(unread):
            yield next(pairs)
        elif len(unread) > 1:
            yield unread[0], unread[1]
        else:
            yield unread[0], bench.chain_operand(other=unread[0])


def _lines(profile: Iterator[tuple[str, str]], count: int) -> Iterator[tuple[str, str]]:
    for _ in range(count):
        yield next(profile)


PROFILES: dict[str, Callable[[Bench], Iterator[tuple[str, str]]]] = {
    profile.__name__: profile for profile in (chain, lemma, recurrent, phoenix)
}
