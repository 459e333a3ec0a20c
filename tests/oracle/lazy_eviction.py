"""Oracle of `lazy_eviction`: the steps in which each token was important, as a list."""

import math
from fractions import Fraction
from itertools import pairwise

from tests.oracle.base import Setting, Vector
from tests.oracle.tokens import CompetingTokensOracle


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def worth(pause: int, longest: int) -> float:
    """Equation 2: `pause` steps after the last important one, with intervals of up to `longest` steps before."""
    if longest == 0:
        return 0.0
    return 2 * sigmoid(-pause / longest) + 2 * sigmoid(-(longest - 1))


class LazyEvictionOracle(CompetingTokensOracle):
    """Of each token it keeps all the steps in which it was important; the first is that in which it was read."""

    def __init__(
        self, setting: Setting, *, alpha: float = 0.0001, window: int = 64, pin_prompt: bool = True
    ) -> None:
        super().__init__(setting, pin_prompt=pin_prompt)
        self.alpha, self.window = alpha, window
        self.important: list[dict[int, list[int]]] = [{} for _ in range(self.heads.kv)]

    def first_recent(self, now: int) -> int:
        return now - min(self.window, self.room()) + 1

    def after_prefill(self, kv_head: int, first: int, queries: list[list[Vector]]) -> None:
        # All of the prompt was read at its end.
        for position in self.kept[kv_head]:
            self.important[kv_head][position] = [self.length - 1]

    def after_step(self, kv_head: int, shares: list[dict[int, float]], now: int) -> None:
        steps = self.important[kv_head]
        steps[now] = [now]
        for position in self.kept[kv_head][:-1]:
            if self.above(max(share[position] for share in shares), self.alpha):
                steps[position].append(now)

    def victim(self, kv_head: int, competing: list[int], now: int) -> int:
        ages = {p: self.age(self.important[kv_head][p], now) for p in competing}
        # The two terms of a sum are the same function, of a quotient and of a whole number: swapped, they tie.
        signs = {
            p: sorted((Fraction(pause, longest or 1), longest - 1)) for p, (pause, longest) in ages.items()
        }
        worths = {p: -worth(*age) for p, age in ages.items()}
        return next(iter(self.best(worths, 1, {p: tuple(sign) for p, sign in signs.items()})))

    def age(self, steps: list[int], now: int) -> tuple[int, int]:
        """Steps since the last important one, and the longest interval between two of them."""
        return now - steps[-1], max((later - earlier for earlier, later in pairwise(steps)), default=0)
