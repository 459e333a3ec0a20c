"""Oracles of the policies that work page by page: fifo, recency, random, raas, quest."""

import math

from tests.oracle.base import RowOracle, Setting, Vector, exact_product, softmax

MASK = 2**64 - 1


def mix(number: int) -> int:
    """The finaliser of splitmix64."""
    number = (number + 0x9E3779B97F4A7C15) & MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)


class PageOracle(RowOracle):
    """Pages aligned to positions. `tables` lists the KV heads that share one set of resident pages."""

    def __init__(self, setting: Setting, *, page_size: int, pin_prompt: bool = True) -> None:
        super().__init__(setting)
        self.page_size = page_size
        self.pin_prompt = pin_prompt
        self.tables: list[list[int]] = [[kv_head] for kv_head in range(self.heads.kv)]
        self.pages: list[set[int]] = [set() for _ in range(self.heads.kv)]

    def least_pages(self, prompt_pages: int) -> int:
        return prompt_pages + 1 if self.pin_prompt else 1

    def pinned(self, page: int) -> bool:
        return self.pin_prompt and page in self.prompt_pages

    def positions(self, page: int) -> range:
        return range(page * self.page_size, min((page + 1) * self.page_size, self.length))

    def positions_of(self, pages: set[int]) -> list[int]:
        return [position for page in sorted(pages) for position in self.positions(page)]

    def prefill(self, queries: list[list[Vector]], keys: list[list[Vector]]) -> None:
        super().prefill(queries, keys)
        for table, pages in enumerate(self.pages):
            pages.update(range(math.ceil(self.length / self.page_size)))
            self.after_prefill(table)
            while not self.pin_prompt and len(pages) > self.capacity():
                pages.remove(self.victim(table))

    def step(self, query: list[Vector], key: list[Vector]) -> None:
        for table, pages in enumerate(self.pages):
            if self.length % self.page_size == 0:
                if len(pages) >= self.capacity():
                    pages.remove(self.victim(table))
                pages.add(self.length // self.page_size)
        self.append(key)
        for table in range(len(self.tables)):
            self.after_step(table, query)

    def victim(self, table: int) -> int:
        free = {page: self.priority(table, page) for page in self.pages[table] if not self.pinned(page)}
        return min(free, key=lambda page: (free[page], page))

    def priority(self, table: int, page: int) -> int:
        raise NotImplementedError

    def after_prefill(self, table: int) -> None:
        """Nothing is learned from the prompt unless a policy says so."""

    def after_step(self, table: int, query: list[Vector]) -> None:
        """Nothing is learned from a step unless a policy says so."""

    def residents(self) -> list[list[int]]:
        tables = zip(self.tables, self.pages, strict=True)
        by_head = {kv_head: pages for kv_heads, pages in tables for kv_head in kv_heads}
        return [self.positions_of(by_head[kv_head]) for kv_head in range(self.heads.kv)]

    def bound(self, query: Vector, kv_head: int, page: int) -> float:
        """The largest q.k that a key inside the box of the page's keys could reach."""
        columns = list(zip(*(self.keys[kv_head][p] for p in self.positions(page)), strict=True))
        return sum(max(q * min(column), q * max(column)) for q, column in zip(query, columns, strict=True))


class WindowOracle(PageOracle):
    """Fifo and recency: the oldest page goes. With one turn it is checked against a closed formula."""

    def priority(self, table: int, page: int) -> int:
        return page

    def after_step(self, table: int, query: list[Vector]) -> None:
        if not self.turns:
            assert self.pages[table] == self.prompt_and_latest_pages()

    def prompt_and_latest_pages(self) -> set[int]:
        """The prompt's pages and as many of the latest pages as fit."""
        total, prompt_pages = math.ceil(self.length / self.page_size), len(self.prompt_pages)
        latest = range(max(prompt_pages, total - (self.capacity() - prompt_pages)), total)
        return {*range(prompt_pages), *latest}


class RandomOracle(PageOracle):
    def __init__(
        self,
        setting: Setting,
        *,
        page_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(setting, page_size=page_size)
        self.seed = seed

    def priority(self, table: int, page: int) -> int:
        draw = mix(self.seed & MASK)
        for word in (table, page, self.length):
            draw = mix((draw + word) & MASK)
        return draw >> 32


class RaasOracle(PageOracle):
    """The page that has not been used for the longest time goes."""

    def __init__(
        self,
        setting: Setting,
        *,
        page_size: int = 16,
        pin_prompt: bool = True,
        r: float = 0.5,
        used: str = "top_r",
        alpha: float = 1e-4,
        score: str = "bound",
        sharing: str = "kv_head",
    ) -> None:
        super().__init__(setting, page_size=page_size, pin_prompt=pin_prompt)
        if sharing == "layer":
            self.tables = [list(range(self.heads.kv))]
            self.pages = [set()]
        self.r, self.used, self.alpha, self.score = r, used, alpha, score
        self.stamps: list[dict[int, int]] = [{} for _ in self.tables]

    def priority(self, table: int, page: int) -> int:
        return self.stamps[table][page]

    def after_prefill(self, table: int) -> None:
        for page in self.pages[table]:
            self.stamps[table][page] = self.positions(page)[-1]

    def after_step(self, table: int, query: list[Vector]) -> None:
        now = self.length - 1
        for page in self.used_pages(table, query) | {now // self.page_size}:
            self.stamps[table][page] = now

    def used_pages(self, table: int, query: list[Vector]) -> set[int]:
        scores = self.scores(table, query)
        if self.used == "alpha":
            return {page for page, score in scores.items() if self.above(score, self.alpha)}
        signs = {page: self.signature(table, query, page) for page in scores}
        return self.best(scores, math.ceil(exact_product(self.r, len(scores))), signs)

    def scores(self, table: int, query: list[Vector]) -> dict[int, float]:
        """Score of every resident page: the maximum over the query heads of the table."""
        per_head = [
            self.head_scores(table, query[query_head], kv_head)
            for kv_head in self.tables[table]
            for query_head in self.heads.queries_of(kv_head)
        ]
        return {page: max(scores[page] for scores in per_head) for page in self.pages[table]}

    def head_scores(self, table: int, query: Vector, kv_head: int) -> dict[int, float]:
        pages = sorted(self.pages[table])
        if self.score == "exact":
            share = softmax(self.logits(query, kv_head, self.positions_of(self.pages[table])))
            return {page: sum(share[p] for p in self.positions(page)) for page in pages}
        bounds = {page: self.bound(query, kv_head, page) for page in pages}
        if self.used == "alpha":
            return softmax({page: self.scaling * bound for page, bound in bounds.items()})
        return bounds

    def signature(self, table: int, query: list[Vector], page: int) -> tuple[tuple[float, ...], ...]:
        return tuple(
            tuple(self.logits(query[query_head], kv_head, self.positions(page)).values())
            for kv_head in self.tables[table]
            for query_head in self.heads.queries_of(kv_head)
        )


class QuestOracle(PageOracle):
    """Nothing goes; a step reads the tail and the pages with the best bounds, a prompt reads everything."""

    def __init__(self, setting: Setting, *, page_size: int = 16) -> None:
        super().__init__(setting, page_size=page_size)
        self.read: list[set[int]] = [set() for _ in range(self.heads.kv)]

    def step(self, query: list[Vector], key: list[Vector]) -> None:
        self.append(key)
        tail = (self.length - 1) // self.page_size
        for kv_head in range(self.heads.kv):
            self.pages[kv_head].add(tail)
            bounds = {
                page: max(self.bound(query[h], kv_head, page) for h in self.heads.queries_of(kv_head))
                for page in self.pages[kv_head] - {tail}
            }
            self.read[kv_head] = {tail} | self.best(bounds, max(1, self.capacity()) - 1)

    def turn_step(self, query: list[Vector], key: list[Vector]) -> None:
        super().turn_step(query, key)
        self.read = [set(pages) for pages in self.pages]

    def least_pages(self, prompt_pages: int) -> int:
        return 1

    def attended(self) -> list[list[int]]:
        return [self.positions_of(pages) for pages in self.read]
