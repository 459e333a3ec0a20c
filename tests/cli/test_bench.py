"""``longthink bench``: tables, JSON, the store, and the one restart that it needs."""

import json
import os
import signal
import sys
import time

import pytest

from longthink.cli import app as cli
from longthink.lab.bench import jct
from longthink.lab.results.store import ResultStore

MODEL = "random:layers=1,hidden=16,heads=2,kv_heads=1,head_dim=8"
SMALL = ("--model", MODEL, "--device", "cpu", "--prompt", "16", "--budget", "64")
JCT = ("bench", "jct", *SMALL, "--lengths", "64,160", "--repeats", "1", "--baselines", "dynamic,static")


def changed(*options):
    """`JCT` with other values of some options."""
    words = list(JCT)
    for name, value in zip(options[::2], options[1::2], strict=True):
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    return words


def measured(folder):
    return ResultStore(folder, create=False).query(
        "SELECT system, decode_tokens, kv_bytes FROM measurements ORDER BY created, system"
    )


@pytest.mark.slow
def test_tables_say_what_was_measured_and_how(call):
    code, out, _ = call(*JCT, "--policies", "raas,dense")
    assert code == 0
    for title in ("milliseconds per token", "seconds to decode", "keys and values"):
        assert title in out
    for name in ("hf dynamic", "hf static", "dense", "raas"):
        assert out.count(f"\n {name} ") == 3
    text = " ".join(out.split())
    assert "After 160 tokens the best dense cache of transformers is hf" in text
    assert "budget=64, prompt of 16 tokens, rows: 1, caches filled with random data" in text
    assert "threads: 1, OMP_WAIT_POLICY=" in text


def test_json_has_conditions_and_rows(call):
    code, out, _ = call(*JCT, "--policies", "raas", "--no-fast-forward", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["conditions"]["fast_forwarded"] is False
    assert found["conditions"].keys() >= {
        "threads",
        "OMP_WAIT_POLICY",
        "load_before",
        "load_after",
        "hardware",
    }
    assert [row["system"] for row in found["rows"]] == ["hf dynamic", "hf static", "raas"] * 3
    assert {row["kv_bytes"] for row in found["rows"] if row["system"] == "raas"} == {64 * 2 * 8 * 4}


@pytest.mark.slow
def test_rows_go_to_the_store(call, tmp_path):
    code, _, _ = call(*JCT, "--policies", "raas", "--out", tmp_path / "store")
    assert code == 0
    rows = measured(tmp_path / "store")
    assert sorted((row["system"], row["decode_tokens"]) for row in rows) == sorted(
        (name, n) for name in ("hf dynamic", "hf static", "raas") for n in (0, 64, 160)
    )


@pytest.mark.slow
def test_the_budget_is_1024_unless_one_is_given(call):
    for given, kept in (((), 1024), (("--decode-budget", "32"), 48)):
        arguments = ("--model", MODEL, "--prompt", "16", "--lengths", "64", "--repeats", "1")
        code, out, _ = call(
            "bench", "jct", *arguments, *given, "--policies", "raas", "--baselines", "", "--json"
        )
        assert code == 0
        assert {row["kv_bytes"] for row in json.loads(out)["rows"]} == {kept * 2 * 8 * 4}


def test_ctrl_c_leaves_what_was_measured_in_the_store(call, tmp_path, monkeypatch):
    turns = iter(range(2))
    real = jct.take_turns

    def interrupted(*arguments):
        if next(turns, None) is None:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(jct, "take_turns", interrupted)
    code, out, err = call(*JCT, "--policies", "raas", "--out", tmp_path / "store", "--json")
    assert code == 130
    assert "interrupted: 6 rows were measured and are in" in err
    assert {row["decode_tokens"] for row in json.loads(out)["rows"]} == {0, 64}
    assert len(measured(tmp_path / "store")) == 6


@pytest.mark.slow
def test_ctrl_c_ends_the_process_that_measures_memory(start, tmp_path):
    store = tmp_path / "store"
    process = start(
        "bench", "memory", *SMALL, "--policies", "raas", "--lengths", "64,1000000", "--out", store
    )
    deadline = time.monotonic() + 60
    while len(list(store.glob("measurements/*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted: 2 rows" in err
    assert b"Traceback" not in err
    assert b"hf dynamic" in out
    assert sorted(row["decode_tokens"] for row in measured(store)) == [0, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lengths", "64,many"), "lengths='many' must be an integer"),
        (("--lengths", ""), "lengths is empty"),
        (("--lengths", "160,64"), "lengths=160,64 must rise"),
        (("--lengths", "64,80"), "there is no room for the 64 steps"),
        (("--policies", "raas,nothing"), "unknown policy 'nothing'"),
        (("--baselines", "eager"), "baselines='eager' is not one of"),
        (("--policies", "", "--baselines", ""), "policies and baselines are empty"),
        (("--decode-budget", "64"), "give exactly one of budget"),
        (("--rows", "0"), "rows=0 is out of range: allowed is >= 1"),
        (("--threads", "0"), "threads=0 is out of range: allowed is >= 1"),
        (("--repeats", "0"), "repeats=0 is out of range: allowed is >= 1"),
        (("--model", "random:heads=3,kv_heads=2"), "kv_heads=2 must divide heads=3"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, arguments, message):
    code, out, err = call(*changed(*arguments))
    assert (code, out) == (2, "")
    assert message in err


def test_a_folder_with_something_else_is_refused_before_anything_is_measured(call, tmp_path, monkeypatch):
    (tmp_path / "letter.txt").write_text("dear")
    monkeypatch.setattr("longthink.lab.bench.models.bench_model", lambda *arguments, **options: pytest.fail())
    code, out, err = call(*JCT, "--out", tmp_path)
    assert (code, out) == (2, "")
    assert "holds something else" in err


# The restart ------------------------------------------------------------------------------------------------------


@pytest.fixture
def restarts(monkeypatch):
    """Calls of execve, from a process that has not loaded torch and does not wait passively."""
    seen = []
    monkeypatch.setattr(os, "execve", lambda *arguments: seen.append(arguments))
    monkeypatch.delitem(sys.modules, "torch")
    for name in cli.PASSIVE:
        monkeypatch.delenv(name, raising=False)
    return seen


@pytest.mark.parametrize("words", [["bench", "jct"], ["--debug", "bench", "memory", "--rows", "2"]])
def test_a_benchmark_starts_again_with_waiting_threads_asleep(restarts, words):
    cli.wait_passively(words)
    ((program, words, environment),) = restarts
    assert (program, words) == (sys.executable, sys.orig_argv)
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["GOMP_SPINCOUNT"] == "0"


def test_nothing_else_is_started_again(restarts, monkeypatch):
    for words in ([], ["generate", "bench"], ["--help"], ["policies"]):
        cli.wait_passively(words)
    for name, value in cli.PASSIVE.items():
        monkeypatch.setenv(name, value)
    cli.wait_passively(["bench", "jct"])
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setitem(sys.modules, "torch", object())
    cli.wait_passively(["bench", "jct"])
    assert restarts == []


@pytest.mark.slow
def test_the_restart_keeps_arguments_output_and_exit_code(start, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    process = start(*JCT, "--policies", "raas:r=0.25, recency", "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert (found["conditions"]["OMP_WAIT_POLICY"], found["conditions"]["GOMP_SPINCOUNT"]) == ("PASSIVE", "0")
    assert {row["system"] for row in found["rows"]} == {"hf dynamic", "hf static", "raas:r=0.25", "recency"}
    process = start(*changed("--lengths", "many"))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.decode().splitlines() == ["longthink: lengths='many' must be an integer: allowed is >= 1"]
