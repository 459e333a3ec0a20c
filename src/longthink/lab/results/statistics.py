"""Intervals and tests for shares of right answers; random draws are seeded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longthink.config import check_int, check_range

Z95 = 1.959964  # quantile of the normal distribution for 95 % intervals
DRAWS = 10_000  # resamples of a bootstrap


def wilson(right: float, total: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of ``right / total``; `right` is fractional if units are means themselves."""
    check_int("total", total, 1)
    check_range("right", right, 0, total)
    z2 = Z95**2
    centre = (right + z2 / 2) / (total + z2)
    half = math.sqrt(z2 * (right * (total - right) / total + z2 / 4)) / (total + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean, or mean difference, with its 95 % interval."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 3, *, sign: str = "") -> str:
        """The mean with its interval in parentheses; `sign` is ``+`` for a difference."""
        mean, low, high = (f"{value:{sign}.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})"


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Return the mean of ``second - first``, a value per problem each, with a percentile bootstrap interval."""
    if len(first) != len(second) or not len(first):
        raise ValueError(f"need two equally long, non-empty lists, got {len(first)} and {len(second)} values")
    check_int("draws", draws, 1)
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    generator = np.random.default_rng(seed)
    # Drawing how often each distinct difference occurs is the same resampling, with little memory.
    values, counts = np.unique(differences, return_counts=True)
    drawn = generator.multinomial(len(differences), counts / len(differences), size=draws)
    low, high = np.quantile(drawn @ values / len(differences), [0.025, 0.975])
    return Interval(mean=float(differences.mean()), low=float(low), high=float(high))


def ratio_bootstrap(
    sums: Sequence[float], counts: Sequence[float], *, seed: int = 0, draws: int = 2000
) -> Interval:
    """Return ``sum(sums) / sum(counts)`` with a percentile bootstrap interval over the units, such as texts.

    Lists of the same length are resampled alike. Draws without any count are left out.
    """
    if len(sums) != len(counts) or not sum(counts) > 0:
        raise ValueError(
            f"need two equally long lists and a positive count, got {len(sums)} and {len(counts)} values"
        )
    check_int("draws", draws, 1)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    totals = drawn @ np.asarray(counts, dtype=float)
    ratios = (drawn @ np.asarray(sums, dtype=float))[totals > 0] / totals[totals > 0]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(mean=sum(sums) / sum(counts), low=float(low), high=float(high))


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the two-sided p value of McNemar's exact test for problems that only one of two gets right.

    With several samples: on which it is right more often (the sign test; McNemar's is its case of one sample).
    """
    check_int("first_only", first_only, 0)
    check_int("second_only", second_only, 0)
    total = first_only + second_only
    tail = ways = 1  # exact integers: ways to choose 0, 1, 2, ... of all
    for k in range(min(first_only, second_only)):
        ways = ways * (total - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**total)


def holm(p_values: Sequence[float]) -> list[float]:
    for value in p_values:
        check_range("p", value, 0, 1)
    adjusted = [0.0] * len(p_values)
    so_far = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = so_far
    return adjusted
