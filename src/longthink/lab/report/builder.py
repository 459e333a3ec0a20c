"""From a result store to a report: one HTML page, figures as files, tables as CSV and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from longthink._version import __version__
from longthink.errors import ResultStoreError, needs_extra
from longthink.lab.report.cells import (
    Cell,
    Row,
    incomplete,
    load_samples,
    make_cells,
    pooled_cells,
    sample_answers,
    series_labels,
)
from longthink.lab.report.comparison import StoreComparison, against_dense, compare_stores, describe
from longthink.lab.report.figures import Figure, Look, budget_figures, sample_figures
from longthink.lab.report.measured import measurement_figures
from longthink.lab.report.page import Page
from longthink.lab.report.plots import save_figures
from longthink.lab.report.style import make_styles
from longthink.lab.report.tables import (
    Labels,
    Table,
    accuracy_table,
    comparison_table,
    measurements_table,
    results_table,
)
from longthink.lab.results.store import ResultStore

PAGE = "report.html"
"""Name of the page in the report's folder."""


def build(
    store_folder: Path | str,
    out_folder: Path | str,
    *,
    against: Path | str | None = None,
    title: str | None = None,
    command: str | None = None,
) -> Path:
    """Write the report of a store: ``report.html``, ``figures/*.png`` and ``*.pdf``, ``tables/*.csv`` and ``*.md``.

    Parameters
    ----------
    store_folder
        A result store.
    out_folder
        Created if needed; an existing report is overwritten.
    against
        Another store; every setup that both have is compared, paired by problem.
    title
        Heading of the page; None names the store.
    command
        The command that made the report, for the page.

    Returns
    -------
    pathlib.Path
        The page.

    Raises
    ------
    ResultStoreError
        If a store is missing, empty or damaged.
    MissingExtraError
        If jinja2, matplotlib, duckdb or pyarrow is not installed.
    """
    with needs_extra("report"):
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    store = ResultStore(store_folder, create=False)
    samples, measurements = _load(store)
    other = _load(ResultStore(against, create=False))[0] if against is not None else None

    cells = make_cells(samples)
    shown = [*cells, *pooled_cells(cells)]
    labels = series_labels(cell.series for cell in cells)
    systems = [row["system"] for row in measurements]
    look = Look(labels=labels, styles=make_styles([*labels.values(), *systems]))
    page = Page(
        title=title or f"Report of {store.folder.resolve().name}", summary=_summary(samples, measurements)
    )
    tables: list[Table] = []
    if other is not None:
        tables.append(_add_comparison(page, compare_stores(samples, other), str(against)))
    if missing := incomplete(cells):
        page.add(
            "Incomplete",
            "text",
            "These configurations lack problems that others have, so their means differ:",
        )
        page.add("Incomplete", "items", missing)
    figures = _figures(shown, measurements, look)
    # All figures of a section stand together, whatever they were made from.
    for figure in figures:
        page.add(figure.section, "figure", figure)
    tables += _add_tables(page, shown, measurements, labels)
    if samples:
        note = "Some answers of each configuration, right and wrong ones. Long texts are cut in the middle."
        page.add("Answers", "note", note)
        page.add("Answers", "answers", sample_answers(store))
    _add_origin(page, store, samples, command)

    out = Path(out_folder)
    out.mkdir(parents=True, exist_ok=True)
    save_figures(figures, out / "figures")
    for table in tables:
        table.save(out / "tables")
    page.save(out / PAGE)
    return out / PAGE


def _load(store: ResultStore) -> tuple[list[Row], list[Row]]:
    """Return samples and measurements; a store without either is an error."""
    samples = load_samples(store)
    measurements = store.query("SELECT * FROM measurements ORDER BY kind, system, run, decode_tokens")
    if not samples and not measurements:
        raise ResultStoreError(f"{store.folder} is an empty result store: there is nothing to report")
    return samples, measurements


def _summary(samples: Sequence[Row], measurements: Sequence[Row]) -> str:
    counts = {
        "answer/answers": len(samples),
        "problem/problems": len({(row["task"], row["problem"]) for row in samples}),
        "policy/policies": len({(row["policy"], row["switches"]) for row in samples}),
        "model/models": len({row["model"] for row in samples}),
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


def _add_tables(
    page: Page, cells: Sequence[Cell], measurements: Sequence[Row], labels: Labels
) -> list[Table]:
    tables = []
    if cells:
        title = "Difference to Dense"
        if comparisons := against_dense(cells):
            tables.append(
                comparison_table(
                    comparisons, labels, name="differences", title=title, before="dense", after="accuracy"
                )
            )
        else:
            page.add(title, "text", "The store has no Dense samples to compare with.")
        tables += [accuracy_table(cells, labels), results_table(cells, labels)]
    if measurements:
        tables.append(measurements_table(measurements))
    for table in tables:
        page.add(table.title, "table", table)
    return tables


def _add_comparison(page: Page, found: StoreComparison, against: str) -> Table:
    """Add the comparison of two stores, its outcome in words first, and return its table."""
    section = "Comparison"
    page.add(section, "text", f"{len(found.comparisons)} setups are in both this store and {against}.")
    if changed := [one for one in found.comparisons if one.significant]:
        page.add(section, "text", "Changed significantly (Holm-adjusted p below 0.05):")
        texts = [
            f"{describe(one.cell)}: {one.before:.1%} to {one.after:.1%}, {100 * one.difference.mean:+.1f} points "
            f"({100 * one.difference.low:+.1f} to {100 * one.difference.high:+.1f}), adjusted p = {one.p_holm:.2g}"
            for one in changed
        ]
        page.add(section, "items", texts)
    elif found.comparisons:
        page.add(section, "text", "Nothing changed significantly (no Holm-adjusted p below 0.05).")
    labels = series_labels(one.cell.series for one in found.comparisons)
    table = comparison_table(
        found.comparisons, labels, name="comparison", title=section, before="there", after="here"
    )
    if found.comparisons:
        page.add(section, "table", table)
    for title, texts in (("Only in this store", found.only_here), (f"Only in {against}", found.only_there)):
        if texts:
            page.add(section, "heading", title)
            page.add(section, "items", texts)
    return table


def _add_origin(page: Page, store: ResultStore, samples: Sequence[Row], command: str | None) -> None:
    origin = store.query(
        "SELECT versions, hardware, count(*) AS count, min(created) AS first, max(created) AS last FROM "
        "(SELECT versions, hardware, created FROM samples UNION ALL SELECT versions, hardware, created FROM "
        "measurements) GROUP BY ALL ORDER BY first, versions, hardware"
    )
    texts = [
        f"{row['count']:,} records from {row['first']} to {row['last']}: {_flat(row['versions'])}; "
        f"{_flat(row['hardware'])}"
        for row in origin
    ]
    page.add("Origin", "items", texts)
    if samples:
        seeds = ", ".join(map(str, sorted({row["seed"] for row in samples})))
        page.add("Origin", "text", f"Seeds: {seeds}. Seeds are pooled, per problem first.")
    if command:
        page.add("Origin", "command", "This report", command)


def _flat(text: str) -> str:
    """Return a JSON object as ``name value`` pairs, anything else unchanged."""
    try:
        return ", ".join(f"{name} {value}" for name, value in json.loads(text).items())
    except (ValueError, AttributeError):
        return text
