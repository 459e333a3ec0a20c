"""Intervals and tests against published values and slow, plain readings of their definitions."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longthink.lab.results.statistics import holm, mcnemar, paired_bootstrap, wilson


def test_wilson_interval_against_known_values():
    # Newcombe 1998, table I: 81 of 263, and the zero case 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20)[1] == 1.0


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.floats(0, n), st.just(n))))
def test_wilson_ends_are_where_the_score_test_turns(pair):
    """Each end p solves (share - p)^2 = z^2 p (1 - p) / n: what the interval is defined by."""
    right, total = pair
    for end in wilson(right, total):
        if 0 < end < 1:
            error = (right / total - end) ** 2 - 1.959964**2 * end * (1 - end) / total
            assert error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("right", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(right, total):
    with pytest.raises(ValueError, match="allowed is"):
        wilson(right, total)


def test_bootstrap_against_every_resample():
    """With five problems all 5^5 resamples can be had; the drawn quantiles are those of the full list."""
    first, second = [0, 1, 0, 0.5, 0], [1, 1, 0.5, 1, 0.9]
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    means = [sum(drawn) / 5 for drawn in itertools.product(gaps, repeat=5)]
    got = paired_bootstrap(first, second, draws=200_000)
    assert got.mean == pytest.approx(sum(gaps) / 5)
    for quantile, value in ((0.025, got.low), (0.975, got.high)):
        below = sum(mean <= value + 1e-9 for mean in means) / len(means)
        above = sum(mean >= value - 1e-9 for mean in means) / len(means)
        # The value is a quantile of the full list, up to the noise of drawing.
        assert below >= quantile - 0.003 and above >= 1 - quantile - 0.003


def test_bootstrap_against_a_slow_reading():
    source = random.Random(3)
    first = [source.random() < 0.7 for _ in range(60)]
    second = [a and source.random() < 0.8 for a in first]
    means = []
    for _ in range(4000):
        drawn = [source.randrange(60) for _ in range(60)]
        means.append(sum(second[i] - first[i] for i in drawn) / 60)
    got = paired_bootstrap(first, second, seed=1)
    assert got.low == pytest.approx(np.quantile(means, 0.025), abs=0.018)
    assert got.high == pytest.approx(np.quantile(means, 0.975), abs=0.018)
    assert got == paired_bootstrap(first, second, seed=1)


def test_bootstrap_is_paired_and_signed():
    same = paired_bootstrap([0, 1, 0, 1], [0, 1, 0, 1])
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert paired_bootstrap([0] * 9, [1] * 9).low == 1


@pytest.mark.parametrize(("first", "second"), [([], []), ([1], [1, 2])])
def test_bootstrap_refuses(first, second):
    with pytest.raises(ValueError, match="equally long, non-empty"):
        paired_bootstrap(first, second)


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_against_every_outcome(b, c):
    """p: share of all equally likely ways for the discordant problems to fall that are at least as lopsided."""
    total = b + c
    lopsided = sum(
        math.comb(total, k) for k in range(total + 1) if min(k, total - k) <= min(b, c)
    )  # ways, by how many fall to the first
    assert mcnemar(b, c) == pytest.approx(lopsided / 2**total)


def test_mcnemar_known_values():
    # Fay 2011 (exact2x2): 21 against 9 discordant pairs give p = 0.04277.
    assert mcnemar(21, 9) == pytest.approx(0.04277, abs=1e-5)
    assert mcnemar(0, 0) == 1.0
    assert 0 <= mcnemar(5000, 5400) < 0.01


def test_holm_known_values():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.6, 0.9]) == [1.0, 1.0]
