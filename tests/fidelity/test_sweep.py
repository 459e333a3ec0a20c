"""Measuring fidelity with the built-in model: resumed, by several processes, and on a Ray cluster."""

import json
import os
import signal
import threading
import time

import psutil
import pyarrow.parquet as pq
import pytest

from longthink.cli import main
from longthink.lab.fidelity.plan import Plan
from longthink.lab.fidelity.summary import summarize
from longthink.lab.fidelity.sweep import FidelitySweep
from longthink.lab.results.store import ResultStore
from longthink.lab.work.workers import run_work

ASKED = dict(
    tasks=("reasoner/s/chain",),
    count=5,
    max_tokens=60,
    policies=("raas", "recency"),
    decode_budgets=(16, 32),
    rows=2,
)


def sweep_in(folder, *, said=None, **more):
    plan = Plan(**ASKED | more)
    return FidelitySweep(
        plan, plan.load_texts(), ResultStore(folder), say=(said if said is not None else []).append
    )


def measured(folder):
    """What does not depend on time, of every record."""
    return ResultStore(folder, create=False).query(
        "SELECT config, text, prompt_tokens, tokens, round(nll_dense, 2) AS dense, round(nll, 2) AS nll, "
        "round(kl, 2) AS kl, long_tokens, evicted, kv_bytes FROM fidelity ORDER BY config, text"
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fidelity") / "store"
    sweep = sweep_in(folder)
    run_work(sweep)
    assert (sweep.total.made, sweep.total.stored) == (20, 0)
    return folder


@pytest.mark.slow
def test_what_is_stored_is_not_measured_again(whole):
    before = measured(whole)
    assert len(before) == 20 and all(row["tokens"] > 0 and row["evicted"] > 0 for row in before)
    again = sweep_in(whole)
    run_work(again)
    assert (again.total.made, again.total.stored) == (0, 20)
    assert measured(whole) == before


@pytest.mark.slow
def test_an_interrupted_run_makes_what_an_undisturbed_one_does(tmp_path, whole):
    first = sweep_in(tmp_path / "store")
    first.report = lambda sweep: (_ for _ in ()).throw(KeyboardInterrupt) if sweep.total.made >= 8 else None
    with pytest.raises(KeyboardInterrupt):
        run_work(first)
    rest = sweep_in(tmp_path / "store")
    run_work(rest)
    assert (rest.total.stored, rest.total.made) == (8, 12)
    assert measured(tmp_path / "store") == measured(whole)


@pytest.mark.slow
def test_a_policy_that_comes_later_is_measured_alone(tmp_path):
    run_work(sweep_in(tmp_path / "store", policies=("raas",), decode_budgets=(16,)))
    more = sweep_in(tmp_path / "store", policies=("raas", "h2o"), decode_budgets=(16,))
    run_work(more)
    assert (more.total.stored, more.total.made) == (5, 5)


@pytest.mark.slow
def test_texts_that_come_later_are_measured_alone(tmp_path):
    run_work(sweep_in(tmp_path / "store", count=3))
    run_work(sweep_in(tmp_path / "store", count=4, policies=("raas",)))
    more = sweep_in(tmp_path / "store")
    run_work(more)
    assert (more.total.stored, more.total.made, more.total.left) == (14, 6, 0)
    assert len(measured(tmp_path / "store")) == 20
    rows = [pq.read_table(path).num_rows for path in (tmp_path / "store" / "fidelity").glob("*.parquet")]
    assert sum(rows) == 20


@pytest.mark.slow
def test_a_summary_holds_the_numbers_of_its_texts(whole):
    sweep = sweep_in(whole)
    run_work(sweep)
    found = summarize(sweep.store, sweep.configs)
    assert [(row.policy, row.decode_budget) for row in found] == [
        ("raas", 16), ("raas", 32), ("recency", 16), ("recency", 32),
    ]  # fmt: skip
    rows = sweep.store.query("SELECT * FROM fidelity WHERE config = ?", (sweep.configs[0],))
    first, tokens = found[0], sum(row["tokens"] for row in rows)
    assert (first.texts, first.tokens) == (5, tokens)
    assert first.kl.mean == pytest.approx(sum(row["kl"] for row in rows) / tokens)
    assert first.loss.mean == pytest.approx(sum(row["nll"] - row["nll_dense"] for row in rows) / tokens)
    assert first.kl.low <= first.kl.mean <= first.kl.high
    assert first.versus["kl"].mean == pytest.approx(first.kl.mean - found[2].kl.mean)
    assert found[2].versus == {}
    assert first.evicted == pytest.approx(
        1 - sum(row["kv_bytes"] for row in rows) / sum(row["dense_kv_bytes"] for row in rows)
    )


@pytest.mark.slow
def test_processes_measure_what_one_does_also_when_one_is_killed(tmp_path, whole):
    said = []
    sweep = sweep_in(tmp_path / "store", said=said)

    def kill_one():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            workers = [p for p in psutil.Process().children() if FidelitySweep.solver in p.cmdline()]
            if sweep.total.made and workers:
                os.kill(workers[0].pid, signal.SIGKILL)
                return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one)
    killer.start()
    run_work(sweep, workers=2)
    killer.join()
    assert measured(tmp_path / "store") == measured(whole)
    assert sweep.lost_workers == len(said) <= 1


@pytest.mark.slow
def test_a_ray_cluster_measures_what_one_process_does(tmp_path, whole):
    pytest.importorskip("ray")
    run_work(sweep_in(tmp_path / "store"), ray="local", workers=1)
    assert measured(tmp_path / "store") == measured(whole)


def test_the_command_line_reads_files_and_prints_a_document(tmp_path, capsys):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "ant = 3 bee = 4 ant + bee " * 20}) + "\n")
    words = (
        f"fidelity --data {path} --policies raas,streaming_llm --decode-budgets 16 --max-tokens 70 "
        f"--out {tmp_path / 'store'} --json"
    ).split()
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["complete"] and document["reference"] == "recency"
    assert [(row["policy"], row["texts"], row["tokens"]) for row in document["rows"]] == [
        ("raas", 1, 54), ("streaming_llm", 1, 54),
    ]  # fmt: skip
    assert document["rows"][0]["kl"]["mean"] >= 0
    assert main(words[:-1]) == 0
    shown = capsys.readouterr()
    assert "streaming_llm" in shown.out and "0 measurements made, 2 were there" in shown.err


def test_the_table_says_why_texts_were_not_scored(tmp_path, capsys):
    short = {"question": "w1 w2", "reasoning": "w3 w4"}
    (tmp_path / "short.jsonl").write_text(json.dumps(short))
    words = [
        "fidelity",
        "--data",
        str(tmp_path / "short.jsonl"),
        "--policies",
        "raas",
        "--decode-budgets",
        "16",
    ]
    assert main([*words, "--out", str(tmp_path / "store")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Up to 1 texts of a row were not scored: they end within the budget" in shown


def test_nothing_is_left_behind_where_a_file_cannot_be_read(tmp_path, capsys):
    words = [
        "fidelity",
        "--data",
        str(tmp_path / "none.jsonl"),
        "--policies",
        "raas",
        "--decode-budgets",
        "16",
    ]
    assert main([*words, "--out", str(tmp_path / "store")]) != 0
    assert "none.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
