"""``longthink eval`` as a user meets it."""

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.evaluate.sweeps import made, raw_keys
from tests.grids import by_day

pytest.importorskip("duckdb", reason="needs the extra eval")
SHORT = ("--tasks", "reasoner/s/chain", "--policies", "recency", "--budgets", 128, "--rows", 2)
SHORT += ("--max-new-tokens", 80)


@pytest.fixture
def problems(tmp_path):
    """A problem file in the words of the random models."""
    path = tmp_path / "mine.jsonl"
    rows = [{"question": "hello there " * (i + 1), "answer": str(i)} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_table_and_json(call, tmp_path):
    out = tmp_path / "store"
    asked = (
        "eval",
        "--tasks",
        "reasoner/s/chain",
        "-n",
        4,
        "--policies",
        "dense,streaming_llm",
        "--budgets",
        48,
    )
    code, shown, err = call(*asked, "--out", out)
    assert code == 0
    assert "8 samples made, 0 were there" in err
    lines = [line.split() for line in shown.splitlines()]
    assert next(line for line in lines if line[:1] == ["dense"])[:5] == [
        "dense",
        "-",
        "reasoner/s/chain",
        "4",
        "100.0%",
    ]
    assert next(line for line in lines if line[:1] == ["streaming_llm"])[1] == "48"
    code, shown, err = call(*asked, "--out", out, "--json")
    record = json.loads(shown)
    assert "0 samples made, 8 were there" in err
    assert record["complete"] is True and record["outcome"]["stored"] == 8
    dense, streaming = record["rows"]
    assert (dense["accuracy"], dense["problems"], dense["truncated"]) == (1.0, 4, 0)
    assert streaming["accuracy"] == 0
    assert streaming["kv_bytes_peak"] < streaming["dense_kv_bytes"]
    assert 0 < dense["low"] < dense["high"] == pytest.approx(1)
    assert record["plan"]["tasks"] == ["reasoner/s/chain"]


@pytest.mark.slow
def test_config_file_and_a_flag_over_it(call, tmp_path):
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"tasks: reasoner/s/chain\ncount: 3\npolicies: recency\nbudgets: 128\nmax-new-tokens: 40\nout: {tmp_path}/a\n"
    )
    assert call("eval", "--config", config, "--count", 2)[0] == 0
    flags = (
        "--tasks",
        "reasoner/s/chain",
        "-n",
        2,
        "--policies",
        "recency",
        "--budgets",
        128,
        "--max-new-tokens",
        40,
    )
    assert call("eval", *flags, "--out", tmp_path / "b")[0] == 0
    assert len(made(tmp_path / "a")) == 2
    assert made(tmp_path / "a") == made(tmp_path / "b")


@pytest.mark.slow
def test_problem_file_and_a_model_with_words_of_its_own(call, tmp_path, plain_model, problems):
    code, out, _ = call(
        "eval", "--model", plain_model, "--data", problems, "--policies", "dense,raas", "--decode-budgets", 32,
        "--max-new-tokens", 20, "--out", tmp_path / "store", "--json",
    )  # fmt: skip
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [(row["task"], row["policy"], row["problems"]) for row in rows] == [
        ("mine", "dense", 6),
        ("mine", "raas", 6),
    ]
    assert all(row["tokens"] == 20 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", by_day(["qwen2"], ["qwen2", "mistral"]))
def test_the_papers_problem_sets_end_to_end(call, tmp_path, bpe_model, architecture):
    """Random models of two architectures on real problems: every policy, with answers graded."""
    if "LONGTHINK_DATA" not in os.environ:
        pytest.skip("LONGTHINK_DATA names no folder with the problem files")
    folder = Path(os.environ["LONGTHINK_DATA"])
    names = ("gsm8k_test_part", "math500_part", "aime24_part")
    model = bpe_model
    if architecture == "mistral":
        from transformers import AutoTokenizer

        from tests.models import build

        model = tmp_path / "mistral"
        tokenizer = AutoTokenizer.from_pretrained(bpe_model)
        tokenizer.save_pretrained(model)
        build("mistral", vocab_size=len(tokenizer)).save_pretrained(model)
    files = [word for name in names for word in ("--data", folder / f"{name}.jsonl")]
    code, out, err = call(
        "eval", "--model", model, *files, "--tasks", ",".join(names), "-n", 2, "--policies",
        "dense,raas,quest,h2o,streaming_llm,recency,random", "--budgets", 1024, "--max-new-tokens", 24,
        "--out", tmp_path / "store", "--json",
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert len(rows) == 7 * 3
    for row in rows:
        assert row["samples"] == 2
        # A prompt of more than 1,024 tokens has no room where all of it is kept; everything else is decoded.
        assert row["tokens"] == 24 * (2 - row["no_room"]) / 2
        assert row["no_room"] == 0 or row["policy"] in ("raas", "recency", "random")
    assert {row["task"] for row in rows} == set(names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--policies", "raas", "-n", 1, "--tasks", "reasoner/s"), "needs a budget"),
        (("--policies", "nonsense"), "unknown policy 'nonsense'"),
        (("--policies", "raas", "--budgets", 8), "budget=8 is too small"),
        (("--budgets", "many"), "budgets='many' must be an integer"),
        (("--tasks", "gsm9k"), "task='gsm9k' is unknown"),
        (("--tasks", "reasoner/s"), "give a count"),
        (("--tasks", ""), "tasks is empty"),
        (("--data", "gone.jsonl"), "gone.jsonl"),
        (("--config", "gone.yaml"), "no such file or folder: gone.yaml"),
        (("--samples", 3, "--tasks", "reasoner/s"), "samples=3 needs a temperature"),
        (("--workers", 0, "--tasks", "reasoner/s", "-n", 1), "workers=0"),
        (("--model", "./gone", "--tasks", "reasoner/s", "-n", 1), "there is no such folder"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("eval", *words)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not Path("results").exists() or "--model" in words


def test_a_folder_with_something_else_is_no_store(call, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    code, _, err = call("eval", *SHORT, "-n", 1, "--out", tmp_path)
    assert code == 2
    assert "holds something else (thesis.tex)" in err


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def start_and_wait(start, folder, *more):
    """Start a sweep of its own process group, and wait until something is stored."""
    process = start("eval", *SHORT, "-n", 14, "--out", folder, *more, start_new_session=True)
    wait_for(lambda: len(list((folder / "samples").glob("*.parquet"))) >= 2 or process.poll() is not None)
    assert process.poll() is None, process.stderr.read()
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", by_day([2], [1, 2]))
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(start, call, tmp_path, workers):
    out = tmp_path / "killed"
    process, children = start_and_wait(start, out, "--workers", workers)
    process.kill()
    process.wait()
    wait_for(lambda: not any(child.is_running() for child in children), 20)
    kept = len(raw_keys(out))
    assert 2 <= kept < 14
    code, _, err = call("eval", *SHORT, "-n", 14, "--out", out)
    assert code == 0
    assert f"{14 - kept} samples made, {kept} were there" in err
    assert set(raw_keys(out).values()) == {1}
    assert call("eval", *SHORT, "-n", 14, "--out", tmp_path / "whole")[0] == 0
    assert made(out, 14) == made(tmp_path / "whole", 14)


@pytest.mark.slow
@pytest.mark.parametrize("workers", by_day([2], [1, 2]))
def test_ctrl_c_stops_within_seconds_and_keeps_what_is_done(start, tmp_path, workers):
    out = tmp_path / "store"
    process, children = start_and_wait(start, out, "--workers", workers)
    os.killpg(process.pid, signal.SIGINT)
    started = time.monotonic()
    shown, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 15
    assert process.returncode == 130
    assert b"Traceback" not in err
    told = int(re.search(rb"interrupted: (\d+) samples were made", err)[1])
    # The last one may have been stored and not yet counted.
    assert len(raw_keys(out)) - told in {0, 1} and told > 0
    assert b"recency" in shown
    wait_for(lambda: not any(child.is_running() for child in children), 20)
