"""Oracles of the policies that work token by token: dense, StreamingLLM, H2O; and a base for those in other files."""

import math

from tests.oracle.base import RowOracle, Setting, Vector, exact_product, softmax


class DenseOracle(RowOracle):
    """Everything stays."""

    def step(self, query: list[Vector], key: list[Vector]) -> None:
        self.append(key)

    def residents(self) -> list[list[int]]:
        return [list(range(self.length)) for _ in range(self.heads.kv)]


class StreamingOracle(RowOracle):
    """The first `sinks` positions and the most recent ones. With one turn it is checked against a closed formula."""

    def __init__(self, setting: Setting, *, sinks: int = 4) -> None:
        super().__init__(setting)
        self.sinks = sinks
        self.kept: list[int] = []

    def prefill(self, queries: list[list[Vector]], keys: list[list[Vector]]) -> None:
        super().prefill(queries, keys)
        self.kept = self.sinks_and_window()

    def step(self, query: list[Vector], key: list[Vector]) -> None:
        if len(self.kept) >= self.capacity():
            self.kept.remove(min(p for p in self.kept if p >= self.sinks))
        self.kept.append(self.length)
        self.append(key)
        assert self.turns or self.kept == self.sinks_and_window()

    def sinks_and_window(self) -> list[int]:
        window = self.capacity() - self.sinks
        return [p for p in range(self.length) if p < self.sinks or p >= self.length - window]

    def least_pages(self, prompt_pages: int) -> int:
        return self.sinks + 1

    def residents(self) -> list[list[int]]:
        return [list(self.kept) for _ in range(self.heads.kv)]


class H2OOracle(RowOracle):
    """Half heavy hitters by accumulated attention, half most recent."""

    def __init__(
        self,
        setting: Setting,
        *,
        heavy: float = 0.5,
        pin_prompt: bool = False,
    ) -> None:
        super().__init__(setting)
        self.heavy = heavy
        self.pin_prompt = pin_prompt
        self.mass: list[dict[int, float]] = [{} for _ in range(self.heads.kv)]

    def least_pages(self, prompt_pages: int) -> int:
        return prompt_pages + 1 if self.pin_prompt else 1

    def recent(self) -> int:
        """Size of the window; a pinned prompt is not part of what window and heavy hitters share."""
        shared = self.capacity() - (len(self.prompt_pages) if self.pin_prompt else 0)
        return shared - math.floor(exact_product(self.heavy, shared))

    def prefill(self, queries: list[list[Vector]], keys: list[list[Vector]]) -> None:
        first = self.length
        super().prefill(queries, keys)
        for kv_head, mass in enumerate(self.mass):
            for position in range(first, self.length):
                mass[position] = 0.0
                for query_head in self.heads.queries_of(kv_head):
                    self.accumulate(kv_head, queries[query_head][position - first], range(position + 1))
            if not self.pin_prompt and self.length > self.capacity():
                self.trim(kv_head)

    def trim(self, kv_head: int) -> None:
        """Of a prompt over budget the window and the heaviest others stay, ties to the higher position."""
        mass, recent = self.mass[kv_head], self.recent()
        window = set(range(self.length - recent, self.length))
        mirrored = {-p: mass[p] for p in mass if p not in window}
        heaviest = {-index for index in self.best(mirrored, self.capacity() - recent)}
        self.mass[kv_head] = {p: mass[p] for p in sorted(window | heaviest)}

    def accumulate(self, kv_head: int, query: Vector, positions: range | list[int]) -> None:
        for position, share in softmax(self.logits(query, kv_head, positions)).items():
            self.mass[kv_head][position] += share

    def step(self, query: list[Vector], key: list[Vector]) -> None:
        now = self.length
        self.append(key)
        for kv_head, mass in enumerate(self.mass):
            if len(mass) >= self.capacity():
                del mass[self.victim(mass, now)]
            mass[now] = 0.0
            positions = sorted(mass)
            for query_head in self.heads.queries_of(kv_head):
                self.accumulate(kv_head, query[query_head], positions)

    def victim(self, mass: dict[int, float], now: int) -> int:
        free = {p: m for p, m in mass.items() if not (self.pin_prompt and p in self.prompt_pages)}
        outside_window = {p: m for p, m in free.items() if p <= now - self.recent()}
        return self.smallest(outside_window)

    def residents(self) -> list[list[int]]:
        return [sorted(mass) for mass in self.mass]


class CompetingTokensOracle(RowOracle):
    """A full row evicts one of the tokens that compete: those that are neither pinned nor recent."""

    def __init__(self, setting: Setting, *, pin_prompt: bool = True) -> None:
        super().__init__(setting)
        self.pin_prompt = pin_prompt
        self.kept: list[list[int]] = [[] for _ in range(self.heads.kv)]

    def least_pages(self, prompt_pages: int) -> int:
        return prompt_pages + 1 if self.pin_prompt else 1

    def room(self) -> int:
        """Tokens that a row may hold besides the pinned ones."""
        return self.capacity() - (len(self.prompt_pages) if self.pin_prompt else 0)

    def prefill(self, queries: list[list[Vector]], keys: list[list[Vector]]) -> None:
        first = self.length
        super().prefill(queries, keys)
        for kv_head, kept in enumerate(self.kept):
            kept.extend(range(first, self.length))
            self.after_prefill(kv_head, first, queries)
            if not self.pin_prompt and self.length > self.capacity():
                kept[:] = self.cut(kept)

    def cut(self, kept: list[int]) -> list[int]:
        """What stays of a prompt over budget."""
        return kept[-self.capacity() :]

    def step(self, query: list[Vector], key: list[Vector]) -> None:
        now = self.length
        self.append(key)
        for kv_head, kept in enumerate(self.kept):
            if len(kept) >= self.capacity():
                pinned = self.prompt_pages if self.pin_prompt else set()
                competing = [p for p in kept if p not in pinned and p < self.first_recent(now)]
                kept.remove(self.victim(kv_head, competing, now))
            kept.append(now)
            shares = [softmax(self.logits(query[h], kv_head, kept)) for h in self.heads.queries_of(kv_head)]
            self.after_step(kv_head, shares, now)

    def first_recent(self, now: int) -> int:
        """The first position that is too recent to compete."""
        raise NotImplementedError

    def victim(self, kv_head: int, competing: list[int], now: int) -> int:
        raise NotImplementedError

    def after_prefill(self, kv_head: int, first: int, queries: list[list[Vector]]) -> None:
        """Learn of the prompt tokens from `first` on."""
        raise NotImplementedError

    def after_step(self, kv_head: int, shares: list[dict[int, float]], now: int) -> None:
        """Learn from the attention of each query head of the group."""
        raise NotImplementedError

    def residents(self) -> list[list[int]]:
        return [sorted(kept) for kept in self.kept]
