"""Oracle of `milestone`: young pages, keepers, and a discriminant by Gaussian elimination; what `recall` shares."""

import math
from typing import Any

from tests.oracle.base import RowOracle, Setting, Vector, dot, exact_product, softmax


def solve(matrix: list[Vector], right: Vector) -> Vector:
    """Gaussian elimination with row pivoting."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for column in range(size):
        pivot = max(range(column, size), key=lambda i: abs(rows[i][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for i in range(size):
            if i != column:
                factor = rows[i][column] / rows[column][column]
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[column], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


def likeness(features: dict[int, Vector], marked: set[int], ridge: float) -> dict[int, float]:
    """How much the features of each position are like those of the marked positions."""
    if not marked:
        return dict.fromkeys(features, 0.0)
    size, count = len(next(iter(features.values()))), len(features)
    mean = [sum(x[i] for x in features.values()) / count for i in range(size)]
    centred = {p: [a - b for a, b in zip(x, mean, strict=True)] for p, x in features.items()}
    covariance = [
        [sum(x[i] * x[j] for x in centred.values()) / count for j in range(size)] for i in range(size)
    ]
    spread = sum(covariance[i][i] for i in range(size)) / size
    for i in range(size):
        covariance[i][i] += ridge * spread + 1e-30
    difference = [sum(centred[p][i] for p in marked) / len(marked) for i in range(size)]
    direction = solve(covariance, difference)
    return {p: dot(x, direction) for p, x in centred.items()}


class YoungPagesOracle(RowOracle):
    """Per KV head the prompt's pages, and young pages in order; several turns with a decode budget only.

    The page in which a turn begins leaves the young pages, and is a page of the prompt from then on.
    """

    def __init__(self, setting: Setting, page_size: int) -> None:
        super().__init__(setting)
        self.page_size = page_size
        self.young: list[list[list[int]]] = [[] for _ in range(self.heads.kv)]

    def pinned(self) -> list[int]:
        """The tokens on pages that hold a token of the user."""
        return [p for p in range(self.length) if p // self.page_size in self.prompt_pages]

    def turn_step(self, query: list[Vector], key: list[Vector]) -> None:
        assert self.limit.on_top_of_prompt
        page, offset = divmod(self.length, self.page_size)
        if offset and page not in self.prompt_pages:
            for young in self.young:
                assert young.pop()[0] == page * self.page_size
        self.prompt_pages.add(page)
        self.step(query, key)

    def least_pages(self, prompt_pages: int) -> int:
        return prompt_pages + 1


class KeepersOracle(YoungPagesOracle):
    """Per KV head: the prompt's pages, the keepers, and the young pages in order."""

    def __init__(
        self, setting: Setting, *, page_size: int = 16, keep: float = 0.8, young: int = 32, alpha: float
    ) -> None:
        super().__init__(setting, page_size)
        self.keep, self.smallest_young, self.alpha = keep, young, alpha
        self.keepers: list[list[int]] = [[] for _ in range(self.heads.kv)]
        self.marked: list[set[int]] = [set() for _ in range(self.heads.kv)]

    def scores(self, kv_head: int, resident: list[int]) -> dict[int, float]:
        """Worth of every resident token."""
        raise NotImplementedError

    def see_shares(self, kv_head: int, shares: list[dict[int, float]]) -> None:
        """Take the attention of each query head of a KV head."""

    def generations(self) -> tuple[int, int]:
        """How many decode pages are keepers, and how many are young."""
        pages = self.capacity() - len(self.prompt_pages | self.coming_pages)
        keepers = math.floor(exact_product(self.keep, pages) + exact_product(0.5, 1))
        keepers = min(keepers, max(0, pages - math.ceil(self.smallest_young / self.page_size)))
        return keepers, pages - keepers

    def step(self, query: list[Vector], key: list[Vector]) -> None:
        now = self.length
        self.append(key)
        for kv_head in range(self.heads.kv):
            if now not in self.pinned():
                self.place(kv_head, now)
            positions = self.residents()[kv_head]
            each = [
                softmax(self.logits(query[query_head], kv_head, positions))
                for query_head in self.heads.queries_of(kv_head)
            ]
            for shares in each:
                self.marked[kv_head] |= {
                    p
                    for p in positions
                    if now - p > self.smallest_young // 2 and self.above(shares[p], self.alpha)
                }
            self.see_shares(kv_head, each)

    def place(self, kv_head: int, now: int) -> None:
        """Put a token that is about to be written on a young page; when there is none left, the oldest goes."""
        young, (keeper_pages, young_pages) = self.young[kv_head], self.generations()
        if now % self.page_size == 0:
            if len(young) == young_pages:
                self.promote(kv_head, young.pop(0), keeper_pages * self.page_size)
            young.append([])
        young[-1].append(now)

    def promote(self, kv_head: int, going: list[int], room: int) -> None:
        candidates = self.keepers[kv_head] + going
        if len(candidates) > room:
            resident = [*self.pinned(), *candidates, *(p for page in self.young[kv_head] for p in page)]
            scores = self.scores(kv_head, resident)
            # Of equal ones the latest stay: `best` gives ties to the lower index.
            kept = self.best({-p: scores[p] for p in candidates}, room)
            candidates = [-index for index in kept]
        self.keepers[kv_head] = sorted(candidates)

    def residents(self) -> list[list[int]]:
        return [
            sorted([*self.pinned(), *keepers, *(p for page in young for p in page)])
            for keepers, young in zip(self.keepers, self.young, strict=True)
        ]


class MilestoneOracle(KeepersOracle):
    """Old tokens are ranked by their likeness to the marked ones."""

    def __init__(self, setting: Setting, *, alpha: float = 0.5, ridge: float = 0.003, **options: Any) -> None:
        super().__init__(setting, alpha=alpha, **options)
        self.ridge = ridge

    def scores(self, kv_head: int, resident: list[int]) -> dict[int, float]:
        marked = self.marked[kv_head] & set(resident)
        scores = dict.fromkeys(resident, 0.0)
        for vectors in (self.keys[kv_head], self.values[kv_head]):
            found = likeness({p: vectors[p] for p in resident}, marked, self.ridge)
            scores = {p: scores[p] + found[p] for p in resident}
        return scores
