"""Rank correlation of replays with answers, against ranks counted by hand."""

import math
from itertools import product

import numpy as np
import pytest

from longthink.errors import TraceError
from longthink.lab.analyze.correlation import correlate
from longthink.lab.analyze.replays import Replay

POLICIES = ("a", "b", "c", "d", "e")


def outcome(problem, policy, *, recall, lookups=1.0, regrets=0, note=""):
    return Replay(task="t", problem=str(problem), policy=policy, budget=64, decode_budget=None, recall=recall,
                   lookups=lookups, regrets=regrets, note=note)  # fmt: skip


def slow_spearman(first, second):
    """Pearson's correlation of ranks, equal values sharing the mean of their ranks."""

    def ranks(values):
        return [
            sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
            for value in values
        ]

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


@pytest.mark.slow
def test_ranks_of_means_over_problems():
    rng = np.random.default_rng(0)
    kept = {key: rng.random(3) for key in product(range(6), POLICIES)}
    right = {("t", str(i), policy, 64, None): float(rng.random() < kept[i, policy][1]) for i, policy in kept}
    outcomes = [
        outcome(i, policy, recall=one[0], lookups=one[1], regrets=int(90 * one[2]))
        for (i, policy), one in kept.items()
    ]
    # What has no answer, had no room or knows the future does not count.
    extra = [outcome(0, "belady", recall=1.0), outcome(1, "optimum", recall=1.0), outcome(9, "a", recall=0.1)]
    found = correlate([*outcomes, *extra], right)
    assert [one.measure for one in found] == ["recall", "lookups", "regrets"]
    accuracy = [np.mean([right["t", str(i), policy, 64, None] for i in range(6)]) for policy in POLICIES]
    for one, column in zip(found, (0, 1, 2), strict=True):
        values = [(int(90 * kept[key][2]) if column == 2 else kept[key][column], key) for key in kept]
        pairs = [
            (a > b) + (a == b) / 2
            for (a, i), (b, j) in product(values, values)
            if right["t", str(i[0]), i[1], 64, None] > right["t", str(j[0]), j[1], 64, None]
        ]
        assert one.ahead == pytest.approx(np.mean(pairs))
        means = [np.mean([kept[i, policy][column] for i in range(6)]) for policy in POLICIES]
        if column == 2:
            means = [np.mean([int(90 * kept[i, policy][2]) for i in range(6)]) for policy in POLICIES]
        assert one.rho == pytest.approx(slow_spearman(means, accuracy))
        assert (one.cells, one.problems) == (5, 6)
        assert one.low <= one.rho <= one.high or one.low < one.high


@pytest.mark.slow
def test_a_sure_order_has_a_narrow_interval():
    right = {
        ("t", str(i), policy, 64, None): float(p > i % 3)
        for i in range(8)
        for p, policy in enumerate(POLICIES)
    }
    found = correlate(
        [
            outcome(int(k[1]), k[2], recall=POLICIES.index(k[2]) / 5, regrets=-POLICIES.index(k[2]))
            for k in right
        ],
        right,
    )
    recall, _, regrets = found
    assert recall.rho > 0.9 and recall.low > 0.8
    assert regrets.rho == pytest.approx(-recall.rho) and regrets.high < -0.8


@pytest.mark.slow
def test_only_problems_that_all_cells_have_count():
    right = {
        ("t", str(i), policy, 64, None): float(p > 1) for i in range(3) for p, policy in enumerate(POLICIES)
    }
    outcomes = [
        outcome(int(k[1]), k[2], recall=0.5, note="no room" if k[1:3] == ("1", "b") else "") for k in right
    ]
    (recall, *_) = correlate(outcomes, right)
    assert recall.problems == 2 and math.isnan(recall.rho)


def test_too_little_is_refused():
    right = {("t", "0", policy, 64, None): 1.0 for policy in POLICIES}
    with pytest.raises(TraceError, match="2 policies at budgets"):
        correlate([outcome(0, "a", recall=1.0), outcome(0, "b", recall=0.5)], right)
