"""A row whose pages are packed when they leave a window, from the rule alone, as Python lists."""

import math
from dataclasses import dataclass, field

from tests.oracle.base import Vector, dot, softmax
from tests.oracle.packing import order_of_channels, read_keys, read_values


@dataclass
class Page:
    keys: list[Vector] = field(default_factory=list)
    values: list[Vector] = field(default_factory=list)
    packed: bool = False
    stamp: int = 0


class TieredRow:
    """One row and one KV head, whose worth of a page is its number (recency) or the step of its last use (raas)."""

    def __init__(
        self, *, bits: tuple[int, int], page: int, window: int, dim: int, item: int, budget: tuple[str, int],
        prompt_stays: bool, rule: str,
    ) -> None:  # fmt: skip
        self.bits, self.page, self.window, self.rule = bits, page, window // page, rule
        self.prompt_stays, self.budget = prompt_stays, budget
        self.in_full = 2 * page * dim * item
        groups = dim // math.gcd(dim, 64)
        self.order_bytes = 2 * dim
        self.packed = page * dim * sum(bits) // 8 + 4 * dim + 4 * page * groups
        self.pages: dict[int, Page] = {}
        self.prompt: set[int] = set()
        self.length = 0

    @property
    def room(self) -> int:
        """How many packed pages the budget has bytes for."""
        kind, tokens = self.budget
        pages = (
            math.ceil(tokens / self.page) + len(self.prompt)
            if kind == "decode_budget"
            else tokens // self.page
        )
        full = self.window + len(self.prompt if self.prompt_stays else {0})
        return ((pages - full) * self.in_full - self.order_bytes) // self.packed

    def prefill(self, queries: list[Vector], keys: list[Vector], values: list[Vector]) -> None:
        """Take a prompt, with the queries of all heads that share the keys."""
        self.order = order_of_channels(keys, queries)
        for key, value in zip(keys, values, strict=True):
            at = self.length // self.page
            page = self.pages.setdefault(at, Page())
            page.keys.append(key)
            page.values.append(value)
            page.stamp = self.length
            self.length += 1
        self.prompt = set(self.pages)
        if not self.prompt_stays:
            for at in sorted(self.pages)[1 : -self.window]:
                self.pack(at)

    def pack(self, at: int) -> None:
        page = self.pages[at]
        page.keys, page.values = (
            read_keys(page.keys, self.bits[0], self.order),
            read_values(page.values, self.bits[1]),
        )
        page.packed = True

    def step(self, queries: list[Vector], key: Vector, value: Vector, scaling: float) -> list[Vector]:
        """Take one token, and return what each query reads."""
        if self.length % self.page == 0:
            stays = self.prompt if self.prompt_stays else {0}
            recent = [at for at, page in sorted(self.pages.items()) if not page.packed and at not in stays]
            if len(recent) >= self.window:
                packed = [at for at, page in self.pages.items() if page.packed]
                if len(packed) >= self.room:
                    free = [at for at in packed if at not in self.prompt]
                    del self.pages[
                        min(free, key=lambda at: (self.pages[at].stamp * (self.rule == "raas"), at))
                    ]
                self.pack(recent[0])
            self.pages[self.length // self.page] = Page()
        tail = self.pages[self.length // self.page]
        tail.keys.append(key)
        tail.values.append(value)
        out = [self.read(query, scaling) for query in queries]
        if self.rule == "raas":
            self.use(queries)
        self.length += 1
        return out

    def read(self, query: Vector, scaling: float) -> Vector:
        keys = [key for page in self.pages.values() for key in page.keys]
        values = [value for page in self.pages.values() for value in page.values]
        weights = softmax({i: scaling * dot(query, key) for i, key in enumerate(keys)})
        return [sum(weights[i] * value[d] for i, value in enumerate(values)) for d in range(len(values[0]))]

    def use(self, queries: list[Vector]) -> None:
        """Stamp the half of the pages with the highest bounds, on keys as they are read, and the newest page."""

        def bound(at: int) -> float:
            columns = [(min(column), max(column)) for column in zip(*self.pages[at].keys, strict=True)]
            return max(
                sum(max(q * low, q * high) for q, (low, high) in zip(query, columns, strict=True))
                for query in queries
            )

        ranked = sorted(self.pages, key=lambda at: (-bound(at), at))
        for at in {*ranked[: math.ceil(len(ranked) / 2)], max(self.pages)}:
            self.pages[at].stamp = self.length

    def positions(self) -> list[int]:
        return sorted(at * self.page + i for at, page in self.pages.items() for i in range(len(page.keys)))
