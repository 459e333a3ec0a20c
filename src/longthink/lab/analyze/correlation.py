"""Does what a policy keeps predict how often it is right? Replays against decoded answers to the same problems."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longthink.errors import TraceError, needs_extra
from longthink.lab.analyze.replays import OPTIMUM, Replay

Key = tuple[str, str, str, int | None, int | None]  # task, problem, policy, budget, decode budget
MEASURES = ("recall", "lookups", "regrets")
_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Spearman's rank correlation of a measure with the share of right answers, over policies at budgets (cells).

    The 95 % bootstrap interval is over problems, which are independent draws; the cells of one policy are not.
    """

    measure: str
    rho: float  # NaN if all cells are equal
    low: float
    high: float
    ahead: float  # pairs in which the right answer has more than the wrong one (area under the ROC curve)
    cells: int
    problems: int  # on which every cell was replayed and decoded


def correlate(replays: Sequence[Replay], correct: Mapping[Key, float], *, seed: int = 0) -> list[Correlation]:
    """Return the correlation of each measure with the share of right answers; `TraceError` below three cells."""
    found = {one.key: one for one in replays if not one.note and one.policy != OPTIMUM and one.key in correct}
    cells = list(dict.fromkeys(key[2:] for key in found))
    asked = dict.fromkeys(key[:2] for key in found)
    problems = [problem for problem in asked if all((*problem, *cell) in found for cell in cells)]
    if len(cells) < 3 or not problems:
        raise TraceError(
            f"{len(cells)} policies at budgets were replayed and decoded on {len(problems)} problems: a correlation "
            "needs at least 3 on the same problems; use the policies, budgets and seeds of longthink eval"
        )

    def table(value: Mapping[Key, float]) -> NDArray[np.float64]:
        return np.array([[value[*problem, *cell] for cell in cells] for problem in problems])

    right = table(correct)
    drawn = np.random.default_rng(seed).integers(0, len(problems), (_DRAWS, len(problems)))
    correlations = []
    for measure in MEASURES:
        kept = table({key: float(getattr(one, measure)) for key, one in found.items()})
        rho = _spearman(kept.mean(0), right.mean(0))
        draws = [_spearman(kept[rows].mean(0), right[rows].mean(0)) for rows in drawn]
        low, high = np.nanquantile(draws, [0.025, 0.975]) if np.isfinite(draws).any() else (np.nan, np.nan)
        correlations.append(
            Correlation(measure=measure, rho=rho, low=float(low), high=float(high),
                        ahead=_ahead(kept[right >= 0.5], kept[right < 0.5]), cells=len(cells),
                        problems=len(problems))
        )  # fmt: skip
    return correlations


def _ahead(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    if not first.size or not second.size:
        return float("nan")
    return float((first[:, None] > second).mean() + 0.5 * (first[:, None] == second).mean())


def _spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Correlation of ranks, tied values sharing theirs; NaN if one of the two is constant."""
    with needs_extra("analyze"):
        from scipy.stats import rankdata
    ranks = np.stack([rankdata(first), rankdata(second)])
    ranks -= ranks.mean(1, keepdims=True)
    size = np.sqrt((ranks**2).sum(1).prod())
    return float(ranks[0] @ ranks[1] / size) if size else float("nan")
