"""A pretrained model from the command line: generate, eval and trace."""

import json

import pytest
import torch

from longthink.lab.analyze.store import TraceStore
from longthink.lab.results.store import ResultStore
from tests.evaluate.data import write_lines
from tests.real import reading
from tests.real.conftest import LENGTH, QUESTION

pytestmark = pytest.mark.slow


@pytest.fixture
def options(folder):
    return ("--model", folder, "--device", "cpu", "--dtype", "float32")


@pytest.fixture
def problems(tmp_path):
    """Two sums in a file."""
    sums = [{"question": f"What is {i} + 3?", "answer": str(i + 3)} for i in (2, 4)]
    return ("--data", write_lines(tmp_path / "sums.jsonl", *sums), "--tasks", "sums")


def test_generate_writes_a_bounded_readable_text(call, options):
    words = ("--decode-budget", 32, "--max-new-tokens", LENGTH, "--temperature", 0, "--json")
    code, out, err = call("generate", QUESTION, *options, *words)
    assert code == 0, err
    record = json.loads(out)
    assert record["evictions"] > 0
    assert record["bytes"]["kv_bytes"] < record["bytes"]["dense_kv_bytes"]
    assert reading.faults(record["text"]) == []


def test_eval_makes_the_answers_of_dense_with_room_and_bounded_ones_without(
    call, options, problems, tmp_path
):
    store, policies = tmp_path / "store", ("--policies", "dense,raas:page_size=4", "--decode-budgets", "8,64")
    code, out, err = call(
        "eval", *problems, *options, *policies, "--max-new-tokens", 20, "--json", "--out", store
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["complete"] is True and record["outcome"]["made"] == 6
    samples = {}
    for row in ResultStore(store, create=False).query("SELECT * FROM samples ORDER BY problem"):
        samples.setdefault(row["decode_budget"], []).append(row)
    texts = {budget: [row["text"] for row in rows] for budget, rows in samples.items()}
    assert texts[64] == texts[None]
    assert all(row["evicted"] == 0 for budget in (64, None) for row in samples[budget])
    assert all(0 < row["kv_bytes_peak"] < row["dense_kv_bytes"] and row["evicted"] > 0 for row in samples[8])


def test_trace_records_what_dense_writes(call, options, problems, model, tmp_path):
    words = ("-n", 1, "--max-new-tokens", 16, "--out", tmp_path / "traces")
    code, _, err = call("trace", *problems, *options, *words)
    assert code == 0, err
    (trace,) = TraceStore(tmp_path / "traces").traces()
    header = trace.header
    assert (header.layers, header.heads, header.kv_heads, header.head_dim) == (30, 9, 3, 64)
    prompt = torch.tensor([header.token_ids[: header.prompt_tokens]])
    expected = model.generate(prompt, max_new_tokens=16, do_sample=False)
    assert expected[0].tolist() == list(header.token_ids)
