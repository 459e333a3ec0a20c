"""Oracle of `tri_attention`: keys and queries without RoPE as complex numbers, and a sum of cosines per distance."""

import cmath
import math

from tests.oracle.base import Setting, Vector
from tests.oracle.tokens import CompetingTokensOracle

DISTANCES = [2**j for j in range(17)]


def frequencies(dim: int) -> list[float]:
    """Radians per position of each pair of features."""
    return [100.0 ** (-2 * f / dim) for f in range(dim // 2)]


def without_rope(vector: Vector, position: int) -> list[complex]:
    """Features i and i + D / 2 are real and imaginary part; RoPE has turned them by the position."""
    half = len(vector) // 2
    return [
        complex(vector[f], vector[f + half]) * cmath.exp(-1j * position * frequency)
        for f, frequency in enumerate(frequencies(len(vector)))
    ]


def score(key: list[complex], distance: int, centre: list[complex], magnitude: list[float]) -> float:
    """Equation of the paper: what a typical query gives a key at a distance."""
    total = 0.0
    for k, q, size, frequency in zip(key, centre, magnitude, frequencies(2 * len(key)), strict=True):
        total += abs(q) * abs(k) * math.cos(frequency * distance + cmath.phase(q) - cmath.phase(k))
        total += (size - abs(q)) * abs(k)
    return total


class TriAttentionOracle(CompetingTokensOracle):
    """Each query head ranks the tokens of earlier rounds by their mean score over distances to come."""

    def __init__(self, setting: Setting, *, window: int = 128, pin_prompt: bool = True) -> None:
        super().__init__(setting, pin_prompt=pin_prompt)
        self.window = window
        self.prompt: list[list[list[complex]]] = [[] for _ in range(self.heads.kv * self.heads.group)]

    def after_prefill(self, kv_head: int, first: int, queries: list[list[Vector]]) -> None:
        for query_head in self.heads.queries_of(kv_head):
            for position in range(first, self.length):
                query = queries[query_head][position - first]
                self.prompt[query_head].append(without_rope(query, position))

    def first_recent(self, now: int) -> int:
        return max(now // self.window * self.window, now - self.room() + 1)

    def after_step(self, kv_head: int, shares: list[dict[int, float]], now: int) -> None:
        """Decoded queries teach nothing."""

    def victim(self, kv_head: int, competing: list[int], now: int) -> int:
        ranks = [self.standardised(kv_head, head, competing, now) for head in self.heads.queries_of(kv_head)]
        worths = {p: max(rank[p] for rank in ranks) for p in competing}
        return self.smallest({p: self.in_steps(worth) for p, worth in worths.items()})

    def in_steps(self, worth: float) -> float:
        """The worth in steps of 1 / 4096; a number between two steps is doubtful."""
        steps = worth * 4096
        self.doubtful |= abs(steps % 1 - 0.5) < 4096 * self.tolerance
        return round(steps) / 4096

    def standardised(self, kv_head: int, head: int, competing: list[int], now: int) -> dict[int, float]:
        queries, start = self.prompt[head], now // self.window * self.window
        columns = list(zip(*queries, strict=True))
        centre = [sum(column) / len(queries) for column in columns]
        magnitude = [sum(map(abs, column)) / len(queries) for column in columns]
        scores = {}
        for p in competing:
            key = without_rope(self.keys[kv_head][p], p)
            ahead = [score(key, start + distance - p, centre, magnitude) for distance in DISTANCES]
            scores[p] = sum(ahead) / len(ahead)
        mean = sum(scores.values()) / len(scores)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in scores.values()) / len(scores))
        # Where the scores are nearly one, rounding makes the difference.
        self.doubtful |= 0 < deviation < 1e-2 * max(map(abs, scores.values()))
        return {p: (x - mean) / max(deviation, 1e-6) for p, x in scores.items()}
