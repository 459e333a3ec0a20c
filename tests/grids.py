"""Grids of cases, of which `make test-fast` runs a few, `make test` more and `make test EXAMPLES=10` all."""

import itertools
from collections.abc import Iterable

import pytest

from tests.examples import TIMES


def slow_but(cases: Iterable, *quick) -> list:
    """The cases for ``parametrize``, all but the quick ones marked slow; each of those must be there."""
    cases = list(cases)
    assert all(case in cases for case in quick), f"{quick} are not all among {cases}"
    slow = [case for case in cases if case not in quick]
    return [
        *quick,
        *(pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in slow),
    ]


def covering(first: Iterable, *others: Iterable) -> list[tuple]:
    """Cells with every value of the first dimension, and with every combination of what the others have."""
    first, combined = list(first), list(itertools.product(*others))
    # One place on after each round, or every other value of the first would only ever meet every other combination.
    place = [(i + i // len(combined)) % len(combined) for i in range(max(len(first), len(combined)))]
    return [(first[i % len(first)], *combined[where]) for i, where in enumerate(place)]


def by_day(usual: Iterable, every: Iterable) -> list:
    """The usual cells of a grid; by night, with more random examples, every one."""
    usual, every = list(usual), list(every)
    assert all(cell in every for cell in usual), f"{usual} are not all among {every}"
    return every if TIMES > 1 else usual
