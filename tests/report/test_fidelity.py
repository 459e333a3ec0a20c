"""The part of a report about fidelity."""

import csv
import io

import pytest

from longthink.lab.report import build
from longthink.lab.report.fidelity import fidelity_cells, fidelity_figures, fidelity_table
from longthink.lab.report.style import make_styles
from longthink.lab.results.store import ResultStore
from tests.results.making import make_fidelity

POLICIES = ("raas", "recency", "mine:note=<b>")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = ResultStore(tmp_path_factory.mktemp("store"))
    for number, policy in enumerate(POLICIES):
        for budget in (64, 128):
            for text in range(3):
                rise = (number + 1) * 64 / budget
                store.add(
                    make_fidelity(
                        policy=policy, decode_budget=budget, text=f"t{text}", tokens=100, nll_dense=50.0,
                        nll=50.0 + 10 * rise, kl=10 * rise + text, long_tokens=4 if text else 0,
                        long_nll_dense=1.0, long_nll=1.0 + (rise if text else 0.0), kv_bytes=budget << 20,
                        dense_kv_bytes=400 << 20,
                    )
                )  # fmt: skip
    store.add(make_fidelity(policy="raas", decode_budget=64, text="short", tokens=0))
    return store


def rows_of(store):
    return store.query("SELECT * FROM fidelity ORDER BY text")


def test_the_table_has_the_numbers(store):
    table = fidelity_table(fidelity_cells(rows_of(store)))
    found = {(row["policy"], row["decode_budget"]): row for row in csv.DictReader(io.StringIO(table.csv()))}
    assert len(found) == 6
    first = found["raas", "64"]
    assert (first["texts"], first["tokens"], first["long-range_tokens"]) == ("3", "300", "8")
    assert first["loss"].startswith("0.100 (0.100 to 0.100)")
    assert first["KL"].startswith("0.110 (0.1")
    assert first["KL_minus_recency"].startswith("-0.100 (-0.100 to -0.100)")
    assert found["recency", "64"]["KL_minus_recency"] == ""
    assert first["their_loss"].startswith("0.250")
    assert float(found["raas", "128"]["held_bytes"]) == 128 << 20


def test_a_line_runs_over_the_budgets_of_a_policy(store):
    cells = fidelity_cells(rows_of(store))
    figures = {figure.name: figure for figure in fidelity_figures(cells, make_styles(POLICIES))}
    assert set(figures) == {"fidelity-kl", "fidelity-loss", "fidelity-long-loss"}
    (panel,) = figures["fidelity-loss"].panels
    lines = {line.label: line for line in panel.lines}
    assert set(lines) == set(POLICIES)
    assert lines["recency"].x == [64.0, 128.0]
    assert lines["recency"].y == pytest.approx([0.2, 0.1])


@pytest.mark.slow
def test_a_store_with_nothing_else_makes_a_page_without_markup_of_its_values(store, tmp_path):
    page = build(store.folder, tmp_path)
    text = page.read_text()
    assert "mine:note=&lt;b&gt;" in text and "note=<b>" not in text
    assert "19 texts read under a cache" in text and "3 policies" in text
    assert (tmp_path / "tables" / "fidelity.csv").exists()
    assert (tmp_path / "figures" / "fidelity-kl.png").exists()
