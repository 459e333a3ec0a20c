"""``python -m bench.peers``: options, tables, the document with its figures, and one real run."""

import json

import pytest

from bench.peers import measure, plan
from bench.peers.__main__ import peers
from bench.peers.plan import MIDDLE
from longthink.lab.results.store import ResultStore
from tests.bench.conftest import LAYERS, MODEL, PER_TOKEN
from tests.bench.test_targets import timed


@pytest.fixture
def given(monkeypatch):
    """Measurements that stand for a run."""
    rows = [
        timed("raas", 10.0, 11.0),
        timed("raas", 9.0, 9.0, context=2048),
        timed("hf static", 50.0, 66.0),
        timed("raas", 40.0, 40.0, scene=1, rows=16, model="S2"),
        timed("hf static", 400.0, 400.0, scene=1, rows=16, model="S2", kv=9000),
    ]
    seen = []

    def pretend(plan, results, report):
        seen.append(plan)
        results.missing["kvpress decoding"] = "no network"
        results.versions["openvino"] = {"openvino": "1.2"}
        for row in rows:
            results.timings.append(row)
            yield row

    monkeypatch.setattr(measure, "measure", pretend)
    return seen


def test_tables_show_times_targets_and_what_is_missing(call, given):
    code, out, _ = call(peers, "--quick")
    assert code == 0
    text = " ".join(out.split())
    assert "S8: milliseconds per token" in text
    assert "10.5 (10.0 to 11.0)" in text
    assert ">= 4.50 5.50 5.00 to 6.00 yes" in text
    assert "kvpress decoding no network" in text
    assert given[0].rounds == 3 and given[0].contexts == (MIDDLE,)


@pytest.mark.slow
def test_the_document_has_command_versions_targets_and_figures(call, given, tmp_path):
    page = tmp_path / "today.md"
    code, out, _ = call(peers, "--document", page, "--out", tmp_path / "store", "--json")
    assert code == 0
    text = page.read_text()
    assert "openvino: openvino 1.2" in text and "longthink" in text
    assert "| best dense of transformers / RaaS, 16k | S8 | &gt;= 4.50 | 5.50 |" in text.replace(
        ">=", "&gt;="
    )
    files = {path.name for path in (tmp_path / "today").iterdir()}
    assert files == {"rows.json", "peers.png", "peers-batches.png"}
    for name in files - {"rows.json"}:
        assert f"(today/{name})" in text
        assert (tmp_path / "today" / name).read_bytes()[:4] == b"\x89PNG"
    written = json.loads((tmp_path / "today" / "rows.json").read_text())
    assert written["rows"] == json.loads(out)["rows"]
    assert written["rows"][0]["rounds_ms"] == [10, 11]
    assert written["missing"] == {"kvpress decoding": "no network"}
    stored = ResultStore(tmp_path / "store", create=False).query("SELECT system FROM measurements")
    assert len(stored) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "hf-static,abacus"), "peers='abacus' is not one of 'hf-dynamic'"),
        (("--policies", "nothing"), "unknown policy 'nothing'"),
        (("--rounds", "0"), "rounds=0 is out of range"),
        (("--document", "page.txt"), "document='page.txt' must end in .md"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, given, arguments, message):
    code, out, err = call(peers, *arguments)
    assert (code, out, given) == (2, "", [])
    assert message in err


@pytest.mark.slow
def test_a_real_run_measures_ours_and_reports_who_is_missing(call, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    # Of one layer and one model: all that takes its time is compiling.
    monkeypatch.setitem(plan.MODELS, "S8", MODEL.replace(f"layers={LAYERS}", "layers=1"))
    monkeypatch.delitem(plan.MODELS, "S2")
    chosen = ("--peers", "hf-static,kvpress-decoding")
    code, out, _ = call(peers, "--quick", *chosen, "--policies", "raas", "--rounds", "1", "--json")
    assert code == 0
    found = json.loads(out)
    assert "kvpress==" in found["missing"].pop("kvpress decoding") and found["missing"] == {}
    systems = [row["system"] for row in found["rows"] if row["kind"] == "peers"]
    each = ["hf static", "raas", "byte floor", "raas", "raas", "raas (generate)"]
    assert systems == [*each, "recency:page_size=16"]
    assert [(row["system"], row["rows"]) for row in found["rows"] if row["kind"] == "batch"] == [
        ("hf static", 16),
        ("raas", 16),
    ]
    held = {row["kv_bytes"] for row in found["rows"] if row["system"] == "raas" and row["kind"] == "peers"}
    assert held == {1024 * PER_TOKEN // LAYERS}
    assert {row["kv_bytes"] for row in found["rows"] if row["system"] == "byte floor"} == held
