"""Fidelity on a real model: dense equals itself, a bounded cache does not, and the command says so."""

import json

import pytest

import longthink
from longthink.cli import main

TEXT = (
    "Tom has 12 apples and gives a third of them to Anna. First I find a third of 12: 12 / 3 = 4, so Anna gets "
    "4 apples. Tom then has 12 - 4 = 8 apples. After that he buys two bags with 5 apples each, which makes "
    "2 * 5 = 10 more apples. Now he has 8 + 10 = 18 apples. Anna started with 3 apples of her own, so with the 4 "
    "from Tom she has 3 + 4 = 7 apples. Together they have 18 + 7 = 25 apples. Let me check: Tom gave Anna 4 "
    "apples, kept 8, and bought 10 more, which is 18. Anna has 7. The sum of 18 and 7 is 25, so the answer is 25."
)
QUESTION = "Tom has 12 apples, gives Anna a third and buys two bags of 5. Anna had 3. How many do they have together?"


@pytest.mark.slow
def test_dense_equals_itself_and_a_bounded_cache_does_not(model, tokenizer):
    rows = longthink.fidelity(
        model, [(QUESTION, TEXT)], policies=["dense", "recall", "recency"], decode_budgets=[32, 64],
        tokenizer=tokenizer,
    )  # fmt: skip
    found = {(row.policy, row.decode_budget): row for row in rows}
    assert found["dense", None].kl.mean < 1e-4 and found["dense", None].differs.mean == 0
    for policy in ("recall", "recency"):
        tight, roomy = found[policy, 32], found[policy, 64]
        assert 0.005 < roomy.kl.mean < tight.kl.mean < 2
        assert tight.kv_bytes < roomy.kv_bytes < roomy.dense_kv_bytes
    assert found["recall", 64].kl.mean < found["recency", 64].kl.mean


@pytest.mark.slow
def test_the_command_reads_a_file_with_a_real_tokenizer(folder, tmp_path, capsys):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"question": QUESTION, "reasoning": TEXT}) + "\n")
    words = [
        "fidelity",
        "--model",
        str(folder),
        "--data",
        str(path),
        "--policies",
        "raas",
        "--max-tokens",
        "90",
    ]
    assert main([*words, "--decode-budgets", "48", "--out", str(tmp_path / "store"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["texts"], row["tokens"]) == (1, 90 - 48)
    assert 0 < row["kl"]["mean"] < 2
