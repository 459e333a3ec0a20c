"""Grids of cases, of which `make test-fast` runs a few and `make test` all."""

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
    """One cell for each value of the first dimension, in which those of the others take turns."""
    cells = []
    for turn, value in enumerate(first):
        cell = [value]
        for other in map(list, others):
            turn, place = divmod(turn, len(other))
            cell.append(other[place])
        cells.append(tuple(cell))
    return cells
