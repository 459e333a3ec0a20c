"""Oracles of the policies that rank single tokens and keep the most recent: SnapKV, TOVA, KeyDiff, R-KV."""

import math
from collections.abc import Hashable

from tests.oracle.base import RowOracle, Setting, Vector, dot, exact_product, softmax


def unit(key: Vector) -> Vector:
    norm = math.sqrt(dot(key, key)) + 1e-8
    return [x / norm for x in key]


class TokenOracle(RowOracle):
    """`held[table]` lists the tokens of a page table, each in its slot; `tables` the KV heads that share one."""

    def __init__(self, setting: Setting, *, pin_prompt: bool = True) -> None:
        super().__init__(setting)
        self.pin_prompt = pin_prompt
        self.tables = [[kv_head] for kv_head in range(self.heads.kv)]
        self.held: list[list[int]] = [[] for _ in self.tables]

    def least_pages(self, prompt_pages: int) -> int:
        return prompt_pages + 1 if self.pin_prompt else 1

    def prefill(self, queries: list[list[Vector]], keys: list[list[Vector]]) -> None:
        super().prefill(queries, keys)
        first = 0 if self.pin_prompt else max(0, self.length - self.capacity())
        self.held = [list(range(first, self.length)) for _ in self.tables]

    def step(self, query: list[Vector], key: list[Vector]) -> None:
        now = self.length
        for table, held in enumerate(self.held):
            if len(held) >= self.capacity():
                held[held.index(self.victim(table, now))] = now
            else:
                held.append(now)
        self.append(key)
        for table in range(len(self.tables)):
            self.observe(table, now, query)

    def victim(self, table: int, now: int) -> int:
        candidates = [p for p in sorted(self.held[table]) if p < now - self.recent(self.free_slots())]
        worths, signs = self.worths(table, candidates)
        free = [p for p in candidates if not (self.pin_prompt and p in self.prompt_pages)]
        return next(iter(self.best({p: -worths[p] for p in free}, 1, {p: signs[p] for p in free})))

    def free_slots(self) -> int:
        return self.capacity() - (len(self.prompt_pages) if self.pin_prompt else 0)

    def recent(self, free: int) -> int:
        """How many recent tokens stay."""
        return 0

    def worths(self, table: int, candidates: list[int]) -> tuple[dict[int, float], dict[int, Hashable]]:
        """Worth of each candidate, in order of position, and what it was computed from."""
        raise NotImplementedError

    def observe(self, table: int, now: int, query: list[Vector]) -> None:
        """Nothing is learned from a step unless a policy says so."""

    def shares(self, table: int, query: list[Vector]) -> list[dict[int, float]]:
        """Softmax attention of every query head of the table over what it holds."""
        return [
            softmax(self.logits(query[query_head], kv_head, self.held[table]))
            for kv_head in self.tables[table]
            for query_head in self.heads.queries_of(kv_head)
        ]

    def residents(self) -> list[list[int]]:
        tables = zip(self.tables, self.held, strict=True)
        by_head = {kv_head: sorted(held) for kv_heads, held in tables for kv_head in kv_heads}
        return [by_head[kv_head] for kv_head in range(self.heads.kv)]


class TovaOracle(TokenOracle):
    def __init__(self, setting: Setting, *, sharing: str = "layer", pin_prompt: bool = True) -> None:
        super().__init__(setting, pin_prompt=pin_prompt)
        if sharing == "layer":
            self.tables, self.held = [list(range(self.heads.kv))], [[]]
        self.last: list[dict[int, float]] = [{} for _ in self.tables]

    def observe(self, table: int, now: int, query: list[Vector]) -> None:
        shares = self.shares(table, query)
        self.last[table] = {p: sum(share[p] for share in shares) / len(shares) for p in self.held[table]}

    def worths(self, table: int, candidates: list[int]) -> tuple[dict[int, float], dict[int, Hashable]]:
        worths = {p: self.last[table].get(p, 0.0) for p in candidates}
        return worths, {p: tuple(tuple(self.keys[k][p]) for k in self.tables[table]) for p in candidates}


class KeyDiffOracle(TokenOracle):
    def __init__(self, setting: Setting, *, recent_share: float = 0.2, pin_prompt: bool = True) -> None:
        super().__init__(setting, pin_prompt=pin_prompt)
        self.recent_share = recent_share

    def recent(self, free: int) -> int:
        return max(0, min(free - 1, math.floor(exact_product(self.recent_share, free))))

    def worths(self, table: int, candidates: list[int]) -> tuple[dict[int, float], dict[int, Hashable]]:
        keys = self.keys[table]
        columns = zip(*(unit(keys[p]) for p in sorted(self.held[table])), strict=True)
        anchor = [sum(column) for column in columns]
        return {p: -dot(unit(keys[p]), anchor) for p in candidates}, {p: tuple(keys[p]) for p in candidates}


class VotingOracle(TokenOracle):
    """`reads[table]` holds what each of the last `window` queries read of every token."""

    def __init__(self, setting: Setting, *, window: int, kernel: int, pin_prompt: bool = True) -> None:
        super().__init__(setting, pin_prompt=pin_prompt)
        self.window, self.kernel = window, kernel
        self.reads: list[list[dict[int, float]]] = [[] for _ in self.tables]

    def recent(self, free: int) -> int:
        return min(self.window, free // 2)

    def observe(self, table: int, now: int, query: list[Vector]) -> None:
        self.reads[table] = [*self.reads[table], self.read(table, query)][-self.window :]

    def read(self, table: int, query: list[Vector]) -> dict[int, float]:
        raise NotImplementedError

    def beside(self, candidates: list[int], index: int) -> list[int]:
        """A candidate and its neighbours."""
        side = self.kernel // 2
        return candidates[max(0, index - side) : index + side + 1]


class SnapKVOracle(VotingOracle):
    def __init__(
        self, setting: Setting, *, window: int = 32, kernel: int = 5, pooling: str = "avg",
        pin_prompt: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(setting, window=window, kernel=kernel, pin_prompt=pin_prompt)
        self.pooling = pooling

    def read(self, table: int, query: list[Vector]) -> dict[int, float]:
        shares = self.shares(table, query)
        return {p: sum(share[p] for share in shares) for p in self.held[table]}

    def worths(self, table: int, candidates: list[int]) -> tuple[dict[int, float], dict[int, Hashable]]:
        votes = {p: sum(read.get(p, 0.0) for read in self.reads[table]) for p in candidates}
        worths, signs = {}, {}
        for index, position in enumerate(candidates):
            beside = self.beside(candidates, index)
            most = max(beside, key=lambda p: votes[p])
            average = sum(votes[p] for p in beside) / len(beside)
            worths[position] = votes[most] if self.pooling == "max" else average
            signs[position] = most if self.pooling == "max" else tuple(beside)
        return worths, signs


class RKVOracle(VotingOracle):
    """Redundancy is estimated for the new token and for `refresh` slots in turn, which go round a power of two."""

    def __init__(
        self, setting: Setting, *, lam: float = 0.1, window: int = 8, kernel: int = 7, threshold: float = 0.5,
        refresh: int = 8, pin_prompt: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(setting, window=window, kernel=kernel, pin_prompt=pin_prompt)
        self.lam, self.threshold, self.refresh = lam, threshold, refresh
        self.likeness: list[dict[int, float]] = [{} for _ in self.tables]
        self.latest: list[dict[int, int | None]] = [{} for _ in self.tables]
        """The most recent token that is similar to a token."""

    def read(self, table: int, query: list[Vector]) -> dict[int, float]:
        logits = [self.logits(query[h], table, self.held[table]) for h in self.heads.queries_of(table)]
        return softmax({p: max(of[p] for of in logits) for p in self.held[table]})

    def observe(self, table: int, now: int, query: list[Vector]) -> None:
        super().observe(table, now, query)
        held, latest = self.held[table], self.latest[table]
        round_trip = 2 ** math.ceil(math.log2(len(held)))
        slots = [(now * self.refresh + i) % round_trip for i in range(self.refresh)]
        visited = {now, *(held[slot] for slot in slots if slot < len(held))}
        for p in visited:
            latest[p] = max((q for q in held if self.similar(table, p, q)), default=None)
        latest.update((p, now) for p in held if self.similar(table, p, now))
        for p in visited:
            counted = [q for q in held if q != p and latest.get(q) != p]
            self.likeness[table][p] = sum(self.cosine(table, p, q) for q in counted) / len(held)

    def cosine(self, table: int, p: int, q: int) -> float:
        return dot(unit(self.keys[table][p]), unit(self.keys[table][q]))

    def similar(self, table: int, p: int, q: int) -> bool:
        cosine = self.cosine(table, p, q)
        self.doubtful |= p != q and self.near(cosine, self.threshold)
        return p != q and cosine > self.threshold

    def worths(self, table: int, candidates: list[int]) -> tuple[dict[int, float], dict[int, Hashable]]:
        likeness = {p: self.likeness[table].get(p, 0.0) for p in candidates}
        redundancy = softmax(likeness)
        importance = dict.fromkeys(candidates, 0.0)
        most: dict[int, list[int]] = {p: [] for p in candidates}
        for read in self.reads[table]:
            share = {p: read.get(p, 0.0) for p in candidates}
            total = sum(share.values()) or 1.0
            for index, position in enumerate(candidates):
                found = max(self.beside(candidates, index), key=lambda p: share[p])
                most[position].append(found)
                importance[position] += share[found] / total / self.window
        worths = {p: self.lam * importance[p] - (1 - self.lam) * redundancy[p] for p in candidates}
        return worths, {p: (tuple(most[p]), likeness[p]) for p in candidates}
