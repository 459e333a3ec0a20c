"""Oracle of `recall`: attention with forgetting, a head start, and a regression of the marks that is left-one-out."""

import math
from collections.abc import Mapping
from typing import Any

from tests.oracle.base import Setting, Vector, dot, exact_product
from tests.oracle.milestone import KeepersOracle, solve

DOUBT, TRUST = 0.05, 0.2


def regression(
    features: Mapping[int, Vector], marked: set[int], ridge: float
) -> tuple[dict[int, float], float]:
    """The fit of each position without the mean, and R^2 of the predictions from all other positions."""
    size, count = len(next(iter(features.values()))), len(features)
    mean = [sum(x[i] for x in features.values()) / count for i in range(size)]
    x = {p: [a - b for a, b in zip(one, mean, strict=True)] for p, one in features.items()}
    share = len(marked) / count
    y = {p: (p in marked) - share for p in features}
    matrix = [[sum(one[i] * one[j] for one in x.values()) / count for j in range(size)] for i in range(size)]
    spread = sum(matrix[i][i] for i in range(size)) / size
    for i in range(size):
        matrix[i][i] += ridge * spread + 1e-30
    weights = solve(matrix, [sum(x[p][i] * y[p] for p in x) / count for i in range(size)])
    fit = {p: dot(one, weights) for p, one in x.items()}
    missed = 0.0
    for p, one in x.items():
        leverage = min(0.95, (dot(one, solve(matrix, one)) + 1) / count)
        missed += (y[p] - (fit[p] - leverage * y[p]) / (1 - leverage)) ** 2
    total = sum((value * count / (count - 1)) ** 2 for value in y.values())
    return fit, 1 - missed / max(total, 1e-9)


class RecallOracle(KeepersOracle):
    def __init__(
        self,
        setting: Setting,
        *,
        memory: int = 100,
        window: float = 0.5,
        head_start: float = 0.1,
        alpha: float = 0.8,
        ridge: float = 0.03,
        **options: Any,
    ) -> None:
        super().__init__(setting, alpha=alpha, **options)
        self.memory, self.window, self.head_start, self.ridge = memory, window, head_start, ridge
        self.attention: list[dict[int, float]] = [{} for _ in range(self.heads.kv)]

    def see_shares(self, kv_head: int, shares: list[dict[int, float]]) -> None:
        old = self.attention[kv_head]
        self.attention[kv_head] = {
            p: old.get(p, 0.0) * (1 - 1 / self.memory)
            + sum(share[p] for share in shares) / len(shares) / self.memory
            for p in shares[0]
        }

    def scores(self, kv_head: int, resident: list[int]) -> dict[int, float]:
        norms = {p: math.sqrt(dot(self.values[kv_head][p], self.values[kv_head][p])) for p in resident}
        mean = max(sum(norms.values()) / len(norms), 1e-9)
        decode = (self.capacity() - len(self.prompt_pages | self.coming_pages)) * self.page_size
        # The token to come is not written yet, but counted.
        started = self.length - 1 - math.floor(exact_product(self.window, decode))
        alike = self.alike(kv_head, resident)
        return {
            p: self.attention[kv_head].get(p, 0.0) * norms[p] / mean
            + self.head_start * (p >= started)
            + alike[p]
            for p in resident
        }

    def alike(self, kv_head: int, resident: list[int]) -> dict[int, float]:
        marked = self.marked[kv_head] & set(resident)
        if len(marked) < 2:
            return dict.fromkeys(resident, 0.0)
        both = [
            regression({p: vectors[p] for p in resident}, marked, self.ridge)
            for vectors in (self.keys[kv_head], self.values[kv_head])
        ]
        trust = min(1.0, max(0.0, (max(r2 for _, r2 in both) - DOUBT) / (TRUST - DOUBT)))
        fit = {p: both[0][0][p] + both[1][0][p] for p in resident}
        scale = max(sum(fit[p] for p in marked) / len(marked), 1e-9)
        return {p: trust * min(1.5, max(-1.0, fit[p] / scale)) for p in resident}
