"""From a result store to a report: one HTML page, figures as files, tables as CSV and Markdown."""

from __future__ import annotations

import json
from collections import Counter
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
    series_labels,
)
from longthink.lab.report.comparison import StoreComparison, against_dense, compare_stores, describe
from longthink.lab.report.escape import for_html
from longthink.lab.report.figures import Figure, Look, budget_figures, sample_figures
from longthink.lab.report.measured import measurement_figures
from longthink.lab.report.page import Page, items, paragraph
from longthink.lab.report.plots import save_figures
from longthink.lab.report.style import make_styles
from longthink.lab.report.tables import (
    Table,
    accuracy_table,
    comparison_table,
    measurements_table,
    results_table,
)
from longthink.lab.report.texts import sample_texts
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
        Made if it is not there; a report that is there is written over.
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
        If plotly, matplotlib, duckdb or pyarrow is not installed.
    """
    with needs_extra("report"):
        import plotly.offline  # noqa: F401
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
    figures = _add_figures(page, shown, measurements, look)
    tables += _add_tables(page, shown, measurements, look)
    _add_texts_and_origin(page, store, [*samples, *measurements], samples, command)

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
    def count(number: int, one: str, many: str) -> str:
        return f"{number:,} {one if number == 1 else many}"

    parts = []
    if samples:
        problems = len({(row["task"], row["problem"]) for row in samples})
        policies = len({(row["policy"], row["switches"]) for row in samples})
        parts = [
            count(len(samples), "answer", "answers"),
            count(problems, "problem", "problems"),
            count(policies, "policy", "policies"),
            count(len({row["model"] for row in samples}), "model", "models"),
        ]
    if measurements:
        parts.append(count(len(measurements), "measured point", "measured points"))
    return ", ".join(parts) + f". Made by longthink {__version__}."


def _add_figures(page: Page, cells: Sequence[Cell], measurements: Sequence[Row], look: Look) -> list[Figure]:
    """Put the figures into the page, measured curves before clouds of samples, and return them."""
    groups = sorted({cell.group for cell in cells})
    figures: list[tuple[Figure, str]] = []
    for number, group in enumerate(groups, start=1):
        mine = [cell for cell in cells if cell.group == group]
        figures += [(figure, group.label) for figure in budget_figures(group, number, mine, look)]
    figures += [(figure, "") for figure in measurement_figures(measurements, look.styles)]
    for number, group in enumerate(groups, start=1):
        mine = [cell for cell in cells if cell.group == group and len(cell.task.members) == 1]
        figures += [(figure, group.label) for figure in sample_figures(group, number, mine, look)]
    if missing := incomplete([cell for cell in cells if len(cell.task.members) == 1]):
        text = "These configurations lack problems that others have, so their means are of other problems:"
        page.add("Incomplete", paragraph(text) + items(missing))
    # All figures of a section stand together, whatever they were made from.
    for figure, subtitle in figures:
        page.add_figure(figure, subtitle)
    return [figure for figure, _ in figures]


def _add_tables(page: Page, cells: Sequence[Cell], measurements: Sequence[Row], look: Look) -> list[Table]:
    tables = []
    if cells:
        comparisons = against_dense(cells)
        differences = comparison_table(
            comparisons,
            look,
            name="differences",
            title="Difference to Dense",
            before="dense",
            after="accuracy",
        )
        if comparisons:
            page.add(differences.title, differences.html([one.significant for one in comparisons]))
            tables.append(differences)
        else:
            page.add(differences.title, paragraph("The store has no Dense samples to compare with."))
        tables += [accuracy_table(cells, look), results_table(cells, look)]
    if measurements:
        tables.append(measurements_table(measurements))
    for table in tables:
        if table.name != "differences":
            page.add(table.title, table.html())
    return tables


def _add_comparison(page: Page, found: StoreComparison, against: str) -> Table:
    """Put the comparison of two stores first, its outcome in words, and return its table."""
    section = "Comparison"
    changed = [one for one in found.comparisons if one.significant]
    counted = f"{len(found.comparisons)} setups are in both this store and {against}."
    page.add(section, paragraph(counted))
    if changed:
        page.add(section, paragraph("Changed significantly (Holm-adjusted p below 0.05):"))
        page.add(
            section,
            items(
                [
                    f"{describe(one.cell)}: {one.before:.1%} to {one.after:.1%}, "
                    f"{100 * one.difference.mean:+.1f} points ({100 * one.difference.low:+.1f} to "
                    f"{100 * one.difference.high:+.1f}), adjusted p = {one.p_holm:.2g}"
                    for one in changed
                ]
            ),
        )
    elif found.comparisons:
        page.add(section, paragraph("Nothing changed significantly (no Holm-adjusted p below 0.05)."))
    labels = series_labels(one.cell.series for one in found.comparisons)
    table = comparison_table(
        found.comparisons, Look(labels=labels, styles={}), name="comparison", title=section,
        before="there", after="here",
    )  # fmt: skip
    if found.comparisons:
        page.add(
            section,
            paragraph(table.note, quiet=True) + table.html([c.significant for c in found.comparisons]),
        )
    for title, texts in (("Only in this store", found.only_here), (f"Only in {against}", found.only_there)):
        if texts:
            page.add(section, f"<h3>{for_html(title)}</h3>" + items(texts))
    return table


def _add_texts_and_origin(
    page: Page, store: ResultStore, rows: Sequence[Row], samples: Sequence[Row], command: str | None
) -> None:
    if samples:
        note = "Some answers of each configuration, right and wrong ones. Long texts are cut in the middle."
        page.add("Answers", paragraph(note, quiet=True) + sample_texts(store))
    origin = store.query(
        "SELECT versions, hardware, count(*) AS count, min(created) AS first, max(created) AS last FROM "
        "(SELECT versions, hardware, created FROM samples UNION ALL SELECT versions, hardware, created FROM "
        "measurements) GROUP BY ALL ORDER BY first, versions, hardware"
    )
    section = "Origin"
    page.add(
        section,
        items(
            [
                f"{row['count']:,} records from {row['first']} to {row['last']}: {_flat(row['versions'])}; "
                f"{_flat(row['hardware'])}"
                for row in origin
            ]
        ),
    )
    if samples:
        seeds = Counter(row["seed"] for row in samples)
        text = f"Seeds: {', '.join(map(str, sorted(seeds)))}. Seeds are pooled, per problem first."
        page.add(section, paragraph(text))
    if command:
        page.add(section, f"<p>This report: <code>{for_html(command)}</code></p>")


def _flat(text: str) -> str:
    """Return a JSON object as ``name value`` pairs, anything else as it is."""
    try:
        found = json.loads(text)
        return ", ".join(f"{name} {value}" for name, value in found.items())
    except (ValueError, AttributeError):
        return text
