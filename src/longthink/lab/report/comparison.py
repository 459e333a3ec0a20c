"""Paired comparisons: of every policy with Dense, and of two stores."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from longthink.lab.report.cells import Cell, Key, Problem, Row, dense_cell, make_cells
from longthink.lab.results.statistics import Interval, holm, mcnemar, paired_bootstrap

LEVEL = 0.05  # a Holm-adjusted p value below this is called significant


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two cells on the problems that both have."""

    cell: Cell  # the one after
    problems: int
    unpaired: int  # problems in only one of the two
    before: float  # accuracy on the problems in both
    after: float
    difference: Interval  # after minus before, with a paired bootstrap interval
    better: int  # problems solved more often after than before
    worse: int
    p: float  # McNemar's exact test
    p_holm: float  # adjusted for the number of comparisons made together

    @property
    def significant(self) -> bool:
        return self.p_holm < LEVEL


def compare(pairs: Iterable[tuple[Cell, Cell]]) -> list[Comparison]:
    """Compare pairs of cells (before, after), without those that have no problem in common."""
    found: list[Comparison] = []
    for before, after in pairs:
        first, second = before.means("correct"), after.means("correct")
        common: list[Problem] = sorted(first.keys() & second.keys())
        if not common:
            continue
        a, b = [first[problem] for problem in common], [second[problem] for problem in common]
        better = sum(y > x for x, y in zip(a, b, strict=True))
        worse = sum(y < x for x, y in zip(a, b, strict=True))
        p = mcnemar(worse, better)
        found.append(Comparison(
            cell=after, problems=len(common), unpaired=len(first.keys() ^ second.keys()),
            before=sum(a) / len(a), after=sum(b) / len(b), difference=paired_bootstrap(a, b),
            better=better, worse=worse, p=p, p_holm=p,
        ))  # fmt: skip
    adjusted = holm([one.p for one in found])
    return [replace(one, p_holm=p) for one, p in zip(found, adjusted, strict=True)]


def against_dense(cells: Sequence[Cell]) -> list[Comparison]:
    pairs = []
    for cell in cells:
        dense = dense_cell(cells, cell)
        if dense is not None and cell.series.name != "dense":
            pairs.append((dense, cell))
    return compare(pairs)


@dataclass(frozen=True, kw_only=True)
class StoreComparison:
    """What has changed from another store to this one: setups in both, and descriptions of those in only one."""

    comparisons: list[Comparison]
    only_here: list[str]
    only_there: list[str]


def compare_stores(samples: Sequence[Row], other: Sequence[Row]) -> StoreComparison:
    """Compare equal setups (model, decoding, task, all switches of the policy, size) of two stores."""
    here, there = ({cell.key: cell for cell in make_cells(rows)} for rows in (samples, other))
    comparisons = compare((there[key], here[key]) for key in here if key in there)
    compared = {one.cell.key for one in comparisons}

    def unmatched(cells: dict[Key, Cell]) -> list[str]:
        return [
            cell.label + (" (in both, but without a common problem)" if key in here and key in there else "")
            for key, cell in cells.items()
            if key not in compared
        ]

    return StoreComparison(comparisons=comparisons, only_here=unmatched(here), only_there=unmatched(there))
