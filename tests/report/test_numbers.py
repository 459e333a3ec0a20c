"""The numbers behind figures and tables: pooling, pairing, and what is never mixed."""

import csv
import io
import re

import pytest

from longthink.errors import ResultStoreError
from longthink.lab.report import build
from longthink.lab.report.cells import incomplete, load_samples, make_cells, pooled_cells, series_labels
from longthink.lab.report.comparison import against_dense, compare_stores
from longthink.lab.report.figures import Look, budget_figures, sample_figures
from longthink.lab.report.measured import measurement_figures
from longthink.lab.report.plots import panel_svg
from longthink.lab.report.style import make_styles
from longthink.lab.report.tables import accuracy_table, results_table
from longthink.lab.results.statistics import wilson
from longthink.lab.results.store import ResultStore
from tests.report.stores import BUDGETS, DECODE_BUDGETS, answers, fill, measure
from tests.results.making import make_measurement, make_sample


def cells_of(store):
    return make_cells(load_samples(store))


def labels_of(cells):
    return series_labels(cell.series for cell in cells)


def look_of(cells):
    labels = labels_of(cells)
    return Look(labels=labels, styles=make_styles(labels.values()))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = fill(tmp_path_factory.mktemp("store"))
    measure(made)
    return made


def test_accuracy_pools_samples_per_problem_and_counts_problems(tmp_path):
    store = ResultStore(tmp_path)
    # p0: two of three right over two seeds; p1: one sample, wrong.
    for seed, sample, correct in ((0, 0, True), (0, 1, True), (1, 0, False)):
        store.add(make_sample(policy="random", budget=64, seed=seed, sample=sample, correct=correct))
    store.add(make_sample(policy="random", budget=64, problem="p1", correct=False))
    (cell,) = cells_of(store)
    share, low, high = cell.share("correct")
    assert share == pytest.approx((2 / 3 + 0) / 2)
    assert (low, high) == pytest.approx(wilson(2 / 3, 2))


def test_budget_and_decode_budget_have_figures_of_their_own(store):
    cells = cells_of(store)
    shown = [*cells, *pooled_cells(cells)]
    figures = {f.name: f for f in budget_figures(cells[0].group, 1, shown, look_of(cells))}
    assert set(figures) == {
        f"{name}-{kind}-1"
        for name in ("accuracy", "tokens", "cut-off")
        for kind in ("budget", "decode-budget")
    }
    for kind, budgets, policies in (
        ("budget", BUDGETS, {"raas"}),
        ("decode-budget", DECODE_BUDGETS, {"raas", "raas:r=0.25", "recency"}),
    ):
        figure = figures[f"accuracy-{kind}-1"]
        assert [panel.title.split(":")[0] for panel in figure.panels] == [
            "gsm8k",
            "reasoner/m/chain",
            "reasoner/m/lookup",
            "reasoner/m/* (2 tasks pooled)",
        ]
        for panel in figure.panels:
            assert panel.x_ticks == sorted(budgets)
            assert {line.label for line in panel.lines if line.kind == "curve"} == policies
            (level,) = (line for line in panel.lines if line.kind == "level")
            assert (level.label, level.y) == ("dense", [0.9])
            for line in panel.lines:
                assert len(line.y) == (len(budgets) if line.kind == "curve" else 1)
        raas = next(line for line in figure.panels[3].lines if line.label == "raas")
        assert raas.y == [0.6] * len(budgets)
        assert list(zip(raas.low, raas.high, strict=True)) == [pytest.approx(wilson(12, 20))] * len(budgets)


def test_no_room_is_wrong_and_not_cut_off(tmp_path):
    store = ResultStore(tmp_path)
    for i, finish in enumerate(("stop", "length", "no_room", "no_room")):
        changes = {"correct": False} if finish == "no_room" else {}
        store.add(make_sample(policy="h2o", budget=64, problem=f"p{i}", finish=finish, **changes))
    cells = cells_of(store)
    (cell,) = cells
    assert [cell.share(name)[0] for name in ("correct", "cut_off", "no_room")] == [0.5, 0.25, 0.5]
    figures = {figure.name: figure for figure in budget_figures(cell.group, 1, cells, look_of(cells))}
    assert figures["no-room-budget-1"].panels[0].lines[0].y == [0.5]


def test_a_family_without_one_of_its_tasks_is_not_pooled(tmp_path):
    store = ResultStore(tmp_path)
    for task in ("reasoner/m/chain", "reasoner/m/lookup"):
        store.add(*answers("dense", task, 5))
    store.add(*answers("raas", "reasoner/m/chain", 5, budget=64))
    assert [cell.series.policy for cell in pooled_cells(cells_of(store))] == ["dense"]


def test_one_task_under_two_limits_stays_two(tmp_path):
    store = ResultStore(tmp_path)
    for task, limit in (("a/x", 10), ("a/x", 20), ("a/y", 10)):
        store.add(*answers("dense", task, 5, max_new_tokens=limit))
    cells = cells_of(store)
    assert len(cells) == 3
    assert pooled_cells(cells) == []


def test_equal_policy_texts_with_other_switches_are_told_apart(tmp_path):
    store = ResultStore(tmp_path)
    for switches in ('{"r": 0.5}', '{"r": 0.4}'):
        store.add(make_sample(policy="raas", switches=switches, budget=64))
    labels = series_labels(cell.series for cell in cells_of(store)).values()
    assert len(set(labels)) == 2
    assert all(label.startswith("raas (switches ") for label in labels)


def test_missing_problems_are_said(tmp_path):
    store = ResultStore(tmp_path)
    store.add(*answers("dense", "gsm8k", 5), *answers("raas", "gsm8k", 2, count=4, budget=64))
    (text,) = incomplete(cells_of(store))
    assert text.startswith("raas, budget 64, on gsm8k: 4 of 10 problems")


def test_difference_to_dense_is_paired(tmp_path):
    store = ResultStore(tmp_path)
    # Dense solves p0 to p8 of ten; raas has p0 to p5 and solves four of them.
    store.add(*answers("dense", "gsm8k", 9), *answers("raas", "gsm8k", 4, count=6, budget=64))
    (one,) = against_dense(cells_of(store))
    assert (one.problems, one.unpaired, one.better, one.worse) == (6, 4, 0, 2)
    assert (one.before, one.after, one.difference.mean) == pytest.approx((1, 4 / 6, -2 / 6))
    assert one.difference.low < one.difference.mean < one.difference.high <= 0
    assert one.p == pytest.approx(0.5)


def test_holm_counts_the_comparisons_of_the_table(tmp_path):
    store = ResultStore(tmp_path)
    store.add(*answers("dense", "gsm8k", 40, count=40))
    store.add(
        *answers("raas", "gsm8k", 34, count=40, budget=64), *answers("h2o", "gsm8k", 39, count=40, budget=64)
    )
    h2o, raas = against_dense(cells_of(store))
    assert raas.p == pytest.approx(2 / 2**6)
    assert raas.p_holm == pytest.approx(2 * raas.p)
    assert not raas.significant
    assert (h2o.p, h2o.p_holm) == (1, 1)


def test_stores_are_compared_setup_by_setup(tmp_path):
    here, there = ResultStore(tmp_path / "here"), ResultStore(tmp_path / "there")
    for store, right in ((here, 30), (there, 10)):
        store.add(*answers("raas", "gsm8k", right, count=40, budget=64))
        store.add(*answers("dense", "gsm8k", 38, count=40))
    here.add(*answers("raas", "gsm8k", 5, budget=128))
    there.add(
        *answers("raas", "gsm8k", 5, decode_budget=64), *answers("h2o", "gsm8k", 1, temperature=0.6, budget=8)
    )
    found = compare_stores(load_samples(here), load_samples(there))
    dense, raas = found.comparisons
    assert (raas.before, raas.after, raas.better, raas.worse) == (0.25, 0.75, 20, 0)
    assert raas.significant and not dense.significant
    assert [text.split(" (")[0] for text in found.only_here] == [
        "raas, budget 128, gsm8k, at most 512 tokens"
    ]
    assert sorted(text.split(",")[0] for text in found.only_there) == ["h2o", "raas"]


def test_single_samples_are_sorted_by_size(store):
    cells = cells_of(store)
    for figure in sample_figures(cells[0].group, 1, cells, look_of(cells)):
        titles = [panel.title for panel in figure.panels]
        assert titles == [
            "budget 64",
            "budget 256",
            "decode budget 32",
            "decode budget 64",
            "decode budget 128",
        ]
        assert {line.label for line in figure.panels[0].lines} == {"dense", "raas"}
        assert all(len(line.x) == 30 for panel in figure.panels for line in panel.lines)


def test_measured_curves(store):
    rows = store.query("SELECT * FROM measurements")
    figures = {f.name: f for f in measurement_figures(rows, make_styles(["raas", "hf dynamic"]))}
    assert set(figures) == {"jct", "step-time", "memory"}
    (panel,) = figures["memory"].panels
    lines = {line.label: line for line in panel.lines}
    assert set(lines) == {"hf dynamic", "raas, decode budget 128", "raas, decode budget 512"}
    assert lines["hf dynamic"].x == [256, 512, 1024, 2048]
    assert lines["hf dynamic"].y == [pytest.approx((163840 + 2048) / 2**20)] * 4
    looks = [lines[name].style for name in sorted(lines)]
    assert looks[1].colour == looks[2].colour != looks[0].colour
    assert looks[1].dash != looks[2].dash
    (panel,) = figures["step-time"].panels
    assert panel.lines[0].low == [2.9] * 4


def test_times_beside_others_have_a_logarithmic_axis(store):
    """They span orders of magnitude: on a linear axis all bounded caches would lie on each other."""
    rows = store.query("SELECT * FROM measurements")
    rows = [row | {"ms_per_token": row["decode_tokens"] ** 2 / 1000} for row in rows if row["kind"] == "jct"]
    rows += [row | {"kind": "peers"} for row in rows]
    figures = {f.name: f for f in measurement_figures(rows, make_styles(["raas", "hf dynamic"]))}
    for name, has_zero, has_powers in (("peers", False, True), ("step-time", True, False)):
        axis = panel_svg(figures[name], 0).split('class="matplotlib.axis"')[2]
        ticks = re.findall(r">([\d.]+)</text>", axis)
        assert ("0" in ticks, {"100", "1000"} <= set(ticks)) == (has_zero, has_powers), (name, ticks)


def test_styles_do_not_depend_on_what_else_is_there():
    few, many = make_styles(["raas", "dense"]), make_styles(["dense", "fifo", "h2o", "raas", "raas:r=0.1"])
    assert few["raas"] == many["raas"]
    assert many["raas"].colour == many["raas:r=0.1"].colour
    assert many["raas"].dash != many["raas:r=0.1"].dash
    names = "dense raas quest h2o streaming_llm recency random fifo keydiff r_kv snapkv tova".split()
    assert len({(s.colour, s.marker) for s in make_styles(names).values()}) == len(names)


def test_tables_as_csv_and_markdown(store, tmp_path):
    cells = cells_of(store)
    table = results_table(cells, labels_of(cells))
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert len(rows) == len(cells) == 3 * (1 + 3 * 3 + 2)
    first = next(row for row in rows if row["policy"] == "raas" and row["decode_budget"] == "32")
    assert (first["budget"], float(first["accuracy"]), first["kv_bytes_(median)"]) == ("", 0.6, "65536.0")
    lines = table.markdown().splitlines()
    # What all rows share is said once, above the table.
    assert "model and decoding" not in lines[4]
    assert "model and decoding reasoner, float32, greedy" in lines[2]
    assert all(line.count("|") == lines[4].count("|") for line in lines[4:])


def test_accuracy_at_a_glance_has_a_line_for_each_policy(store):
    cells = cells_of(store)
    table = accuracy_table(cells, labels_of(cells))
    sizes = [f"budget {n}" for n in BUDGETS] + [f"decode budget {n}" for n in DECODE_BUDGETS]
    assert list(table.columns)[4:] == ["everything kept", *sizes]
    tasks = {cell.task for cell in cells}
    assert len(table.rows) == len(tasks) * len({cell.series for cell in cells})
    found = {(row[1], row[3]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    for cell in cells:
        shown = found[cell.task.name, cell.series.policy][cell.size.label]
        share, low, high = (100 * part for part in cell.share("correct"))
        assert shown == f"{share:.1f} ({low:.0f} to {high:.0f}) of {len(cell.by_problem)}"
    assert sum(value is not None for row in table.rows for value in row[4:]) == len(cells)


@pytest.mark.slow
def test_report_writes_every_file(tmp_path):
    store = ResultStore(tmp_path / "store")
    store.add(*answers("dense", "$x$ & <b>", 9), make_measurement(kind="jct"), make_measurement(run="r"))
    for size in ({"budget": 64}, {"decode_budget": 64}):
        store.add(*answers("raas:$\\frac{", "$x$ & <b>", 5, **size))
    page = build(store.folder, tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    kinds = [
        f"{name}-{kind}-1"
        for name in ("accuracy", "tokens", "cut-off")
        for kind in ("budget", "decode-budget")
    ]
    figures = [*kinds, "jct", "step-time", "memory", "jct-samples-1", "memory-samples-1"]
    assert names == {f"{name}.{ending}" for name in figures for ending in ("png", "pdf")}
    for path in (tmp_path / "out" / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")
    tables = ("accuracy", "results", "differences", "measurements")
    found = {path.name for path in (tmp_path / "out" / "tables").iterdir()}
    assert found == {f"{name}.{ending}" for name in tables for ending in ("csv", "md")}


def test_empty_missing_and_damaged_stores(tmp_path):
    ResultStore(tmp_path / "empty")
    with pytest.raises(ResultStoreError, match="empty is an empty result store: there is nothing to report"):
        build(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ResultStoreError, match="gone is not a result store"):
        build(tmp_path / "gone", tmp_path / "out")
    fill(tmp_path / "full")
    with pytest.raises(ResultStoreError, match="gone is not a result store"):
        build(tmp_path / "full", tmp_path / "out", against=tmp_path / "gone")
    (tmp_path / "full" / "samples" / "guest.parquet").write_text("no table")
    with pytest.raises(ResultStoreError, match=r"guest\.parquet is damaged"):
        build(tmp_path / "full", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "gone").exists()
