"""What every oracle shares: one row of a batch, kept as plain Python lists of floats.

The oracles are written from the rules alone and import nothing of the library. They favour the shortest
statement of a rule over speed. An oracle only decides which positions stay; attention is computed elsewhere.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

Vector = list[float]


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def softmax(logits: Mapping[int, float]) -> dict[int, float]:
    top = max(logits.values())
    weights = {index: math.exp(logit - top) for index, logit in logits.items()}
    total = sum(weights.values())
    return {index: weight / total for index, weight in weights.items()}


def exact_product(share: float, count: int) -> Fraction:
    """``share * count`` as the decimal number that the user wrote, free of binary rounding."""
    return Fraction(str(share)) * count


def exactly_representable(value: float) -> bool:
    """True for a short dyadic fraction: every order of summation gives it without rounding."""
    return abs(value) < 2048 and value * 4096 == int(value * 4096)


@dataclass(frozen=True)
class Limit:
    """The budget of a row: `tokens` in all, or on top of the pages that the user's tokens touch."""

    tokens: int
    on_top_of_prompt: bool

    def in_pages(self, prompt_pages: int, page_size: int) -> int:
        if self.on_top_of_prompt:
            return prompt_pages + math.ceil(self.tokens / page_size)
        return self.tokens // page_size


@dataclass(frozen=True)
class Heads:
    """Grouped-query layout: KV head k serves the query heads k * group .. k * group + group - 1."""

    kv: int
    group: int

    def queries_of(self, kv_head: int) -> range:
        return range(kv_head * self.group, (kv_head + 1) * self.group)


@dataclass(frozen=True)
class Setting:
    """What every oracle is given. Two numbers closer than `tolerance` (relative) count as nearly tied."""

    limit: Limit
    heads: Heads
    scaling: float = 1.0
    tolerance: float = 1e-11


class RowOracle:
    """One row: `prefill` any number of times, then turns and decode steps in any order.

    A turn is announced by `begin_turn`; each of its tokens is then one `turn_step`.

    `doubtful` turns True when a decision hung on a difference that rounding could turn round
    (a near tie that is not a tie by construction); what follows must then not be compared.
    """

    def __init__(self, setting: Setting) -> None:
        self.limit = setting.limit
        self.heads = setting.heads
        self.scaling = setting.scaling
        self.tolerance = setting.tolerance
        self.keys: list[list[Vector]] = [[] for _ in range(setting.heads.kv)]
        self.values: list[list[Vector]] = [[] for _ in range(setting.heads.kv)]
        self.page_size = 1
        self.prompt_pages: set[int] = set()
        """Pages with a token of the user that has been read."""
        self.coming_pages: set[int] = set()
        """Those of the turn that is being read."""
        self.turns = 0
        self.length = 0
        self.doubtful = False

    def see_values(self, values: list[list[Vector]]) -> None:
        """Take `values[kv head][token]` of tokens that are about to be prefilled or stepped."""
        for kept, new in zip(self.values, values, strict=True):
            kept.extend(new)

    def prefill(self, queries: list[list[Vector]], keys: list[list[Vector]]) -> None:
        """Take `queries[query head][token]` and `keys[kv head][token]` of real prompt tokens."""
        for kept, new in zip(self.keys, keys, strict=True):
            kept.extend(new)
        self.length += len(keys[0])
        self.prompt_pages = self.pages_of(range(self.length))

    def step(self, query: list[Vector], key: list[Vector]) -> None:
        """Take `query[query head]` and `key[kv head]` of the next token."""
        raise NotImplementedError

    def begin_turn(self, tokens: int) -> None:
        """Make room for so many tokens of the user: the pages that they touch count from now on."""
        self.coming_pages = self.pages_of(range(self.length, self.length + tokens))
        self.turns += tokens > 0

    def turn_step(self, query: list[Vector], key: list[Vector]) -> None:
        """A step with a token of the user, whose page belongs to the prompt from then on."""
        self.step(query, key)
        self.prompt_pages |= self.pages_of([self.length - 1])

    def fits(self, tokens: int) -> bool:
        """Whether a turn of so many tokens leaves room to decode."""
        coming = self.pages_of(range(self.length, self.length + tokens))
        pages = len(self.prompt_pages | coming)
        return self.limit.in_pages(pages, self.page_size) >= self.least_pages(pages)

    def least_pages(self, prompt_pages: int) -> int:
        """The smallest capacity with which a row with so many prompt pages can decode."""
        return 0

    def capacity(self) -> int:
        return self.limit.in_pages(len(self.prompt_pages | self.coming_pages), self.page_size)

    def pages_of(self, positions: Iterable[int]) -> set[int]:
        return {position // self.page_size for position in positions}

    def residents(self) -> list[list[int]]:
        """Sorted positions that are still kept, per KV head."""
        raise NotImplementedError

    def attended(self) -> list[list[int]]:
        """Positions that the last decode step read, per KV head."""
        return self.residents()

    def append(self, key: list[Vector]) -> None:
        for kept, new in zip(self.keys, key, strict=True):
            kept.append(new)
        self.length += 1

    def logits(self, query: Vector, kv_head: int, positions: Iterable[int]) -> dict[int, float]:
        return {p: self.scaling * dot(query, self.keys[kv_head][p]) for p in positions}

    def near(self, left: float, right: float) -> bool:
        return abs(left - right) <= self.tolerance * (1 + abs(left))

    def best(
        self, values: Mapping[int, float], count: int, signs: Mapping[int, object] | None = None
    ) -> set[int]:
        """The indices of the `count` largest values, a tie going to the lower index.

        Entries with equal `signs` were computed from the same numbers in the same order: they tie for sure.
        """
        ranked = sorted(values, key=lambda index: (-values[index], index))
        chosen = ranked[:count]
        if 0 < count < len(ranked):
            edge, beyond = values[ranked[count - 1]], values[ranked[count]]
            close = [i for i in ranked if self.near(values[i], edge) or self.near(values[i], beyond)]
            if self.near(edge, beyond):
                same = signs is not None and len({signs[i] for i in close}) == 1
                self.doubtful |= not same and not all(exactly_representable(values[i]) for i in close)
        return set(chosen)

    def smallest(self, values: Mapping[int, float]) -> int:
        """The index of the smallest value, a tie going to the lowest index."""
        return next(iter(self.best({index: -value for index, value in values.items()}, 1)))

    def above(self, value: float, threshold: float) -> bool:
        exact = exactly_representable(value) and exactly_representable(threshold)
        self.doubtful |= self.near(value, threshold) and not exact
        return value > threshold
