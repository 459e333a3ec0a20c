"""From a result store to a report: one HTML page, figures as files, tables as CSV and Markdown."""

from collections.abc import Sequence
from pathlib import Path

from longthink._version import __version__
from longthink.errors import ResultStoreError, needs_extra
from longthink.lab.report.cells import (
    POLICY,
    Cell,
    Row,
    incomplete,
    load_samples,
    make_cells,
    pooled_cells,
    sample_answers,
    series_labels,
)
from longthink.lab.report.comparison import against_dense, compare_stores
from longthink.lab.report.fidelity import fidelity_cells, fidelity_figures, fidelity_table
from longthink.lab.report.figures import Figure, Look, budget_figures, sample_figures
from longthink.lab.report.measured import measurement_figures
from longthink.lab.report.page import Page
from longthink.lab.report.style import make_styles
from longthink.lab.report.tables import (
    Labels,
    accuracy_table,
    comparison_table,
    measurements_table,
    results_table,
)
from longthink.lab.results.object_store import open_store
from longthink.lab.results.store import ResultStore

PAGE = "report.html"


def build(
    store_folder: Path | str,
    out_folder: Path | str,
    *,
    against: Path | str | None = None,
    title: str | None = None,
    command: str | None = None,
) -> Path:
    """Write the report of a store: ``report.html``, ``figures/*.png`` and ``*.pdf``, ``tables/*.csv`` and ``*.md``.

    An existing report is overwritten. Every setup that `against`, another store, has too is compared, paired by
    problem. `title` None names the store; `command` is shown as the report's origin. Returns the path of the page.
    """
    with needs_extra("report"):
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    store = open_store(store_folder, create=False)
    samples, fidelity, measurements = _load(store)
    other = _load(open_store(against, create=False))[0] if against is not None else None

    cells = make_cells(samples)
    shown = [*cells, *pooled_cells(cells)]
    labels = series_labels(cell.series for cell in cells)
    systems = [row["system"] for row in measurements]
    readers = [row["policy"] for row in fidelity]
    look = Look(labels=labels, styles=make_styles([*labels.values(), *systems, *readers]))
    page = Page(
        title=title or f"Report of {store.name}",
        summary=_summary(samples, fidelity, measurements),
    )
    if other is not None:
        found = compare_stores(samples, other)
        both = series_labels(one.cell.series for one in found.comparisons)
        table = comparison_table(found.comparisons, both, "comparison", "Comparison", "there", "here")
        page.add(table.title, "comparison", found, table, str(against))
    if missing := incomplete(cells):
        page.add("Incomplete", "incomplete", missing)
    for figure in _figures(shown, measurements, look):
        page.add(figure.section, "figure", figure)
    if fidelity:
        read = fidelity_cells(fidelity)
        for figure in fidelity_figures(read, look.styles):
            page.add(figure.section, "figure", figure)
        page.add("Fidelity", "table", fidelity_table(read))
    _add_tables(page, shown, measurements, labels)
    if samples:
        page.add("Answers", "answers", sample_answers(store))
    seeds = sorted({row["seed"] for row in samples})
    page.add("Origin", "origin", store.query(_ORIGIN), seeds, command)
    return page.save(Path(out_folder) / PAGE)


def _load(store: ResultStore) -> tuple[list[Row], list[Row], list[Row]]:
    """Return samples, fidelity and measurements; a store without any is an error."""
    samples = load_samples(store)
    fidelity = store.query(f"SELECT * REPLACE ({POLICY}) FROM fidelity ORDER BY text")
    measurements = store.query("SELECT * FROM measurements ORDER BY kind, system, run, decode_tokens")
    if not samples and not fidelity and not measurements:
        raise ResultStoreError(f"{store.place} is an empty result store: there is nothing to report")
    return samples, fidelity, measurements


_ORIGIN = """
    SELECT versions, hardware, count(*) AS count, min(created) AS first, max(created) AS last
    FROM (SELECT versions, hardware, created FROM samples
          UNION ALL SELECT versions, hardware, created FROM fidelity
          UNION ALL SELECT versions, hardware, created FROM measurements)
    GROUP BY ALL ORDER BY first, versions, hardware
"""


def _summary(samples: Sequence[Row], fidelity: Sequence[Row], measurements: Sequence[Row]) -> str:
    counts = {
        "answer/answers": len(samples),
        "problem/problems": len({(row["task"], row["problem"]) for row in samples}),
        "text read under a cache/texts read under a cache": len(fidelity),
        "policy/policies": len({(row["policy"], row["switches"]) for row in (*samples, *fidelity)}),
        "model/models": len({row["model"] for row in (*samples, *fidelity)}),
        "measured point/measured points": len(measurements),
    }
    parts = [f"{count:,} {words.split('/')[count > 1]}" for words, count in counts.items() if count]
    return f"{', '.join(parts)}. Made by longthink {__version__}."


def _figures(cells: Sequence[Cell], measurements: Sequence[Row], look: Look) -> list[Figure]:
    """Return all figures, measured curves before clouds of samples."""
    over_budgets, clouds = [], []
    for number, group in enumerate(sorted({cell.group for cell in cells}), start=1):
        mine = [cell for cell in cells if cell.group == group]
        over_budgets += budget_figures(group, number, mine, look)
        clouds += sample_figures(group, number, [cell for cell in mine if len(cell.task.members) == 1], look)
    return [*over_budgets, *measurement_figures(measurements, look.styles), *clouds]


def _add_tables(page: Page, cells: Sequence[Cell], measurements: Sequence[Row], labels: Labels) -> None:
    tables = []
    if cells:
        differences = comparison_table(
            against_dense(cells), labels, "differences", "Difference to Dense", "dense", "accuracy"
        )
        if differences.rows:
            tables.append(differences)
        else:
            page.add(differences.title, "text", "The store has no Dense samples to compare with.")
        tables += [accuracy_table(cells, labels), results_table(cells, labels)]
    if measurements:
        tables.append(measurements_table(measurements))
    for table in tables:
        page.add(table.title, "table", table)
