"""Grids of cases, of which `make test-fast` runs a few and `make test` all."""

import itertools
from collections.abc import Iterable

import pytest


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
