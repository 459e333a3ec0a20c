"""Attention recall against a slow reading: sums of dense attention over positions that are known to stay."""

import json

import pytest
import torch

from longthink.evaluate import recall
from longthink.policies import make_policy
from tests.models import build

PROMPT, LENGTH, BUDGET = 9, 40, 20


@pytest.fixture(scope="module")
def scene():
    model = build("qwen2")
    text_N = torch.randint(3, 97, (LENGTH,), generator=torch.Generator().manual_seed(0))
    return model, text_N, recall.dense_attention(model, text_N)


def measured(scene, spec, budget=BUDGET):
    model, text_N, attention_LHNN = scene
    return recall.attention_recall(model, text_N, PROMPT, attention_LHNN, make_policy(spec), budget)


def test_dense_attention_is_causal_and_leaves_the_model_as_it_was(scene):
    model, _, attention_LHNN = scene
    assert attention_LHNN.shape == (2, 4, LENGTH, LENGTH)
    torch.testing.assert_close(attention_LHNN.sum(-1), torch.ones(2, 4, LENGTH))
    assert float(attention_LHNN.triu(1).abs().max()) == 0
    assert model.config._attn_implementation != "eager"


def test_what_keeps_everything_recalls_everything(scene):
    for spec in ("dense", "quest:page_size=4", "milestone:page_size=4"):
        found = measured(scene, spec, budget=64)
        assert found["mean"] == pytest.approx(1, abs=1e-5) and found["worst"] == pytest.approx(1, abs=1e-5)


def test_a_pinned_window_recalls_what_falls_on_prompt_and_window(scene, monkeypatch):
    monkeypatch.setattr(recall, "CONFIDENT", 0.15)  # random weights are never that sure
    attention = scene[2].tolist()
    shares, lookups = [], []
    for now in range(PROMPT, LENGTH):
        kept = [p for p in range(now + 1) if p < PROMPT or p > now - (BUDGET - PROMPT)]
        shares.append([[sum(head[now][p] for p in kept) for head in layer] for layer in attention])
        for layer, row in zip(attention, shares[-1], strict=True):
            for head, share in zip(layer, row, strict=True):
                if max(head[now][: max(0, now - recall.NEAR)], default=0) > recall.CONFIDENT:
                    lookups.append(share)
    flat = [share for step in shares for row in step for share in row]
    worst = min(sum(step[i][h] for step in shares) / len(shares) for i in range(2) for h in range(4))
    found = measured(scene, "recency")
    assert found["mean"] == pytest.approx(sum(flat) / len(flat), abs=1e-5)
    assert found["worst"] == pytest.approx(worst, abs=1e-5)
    assert len(lookups) > 3
    assert found["lookups"] == pytest.approx(sum(lookups) / len(lookups), abs=1e-5)
    assert found["mean"] < 0.99


def test_a_table_that_serves_the_layer_counts_for_all_heads(scene):
    per_head = measured(scene, "raas:page_size=4:sharing=kv_head:r=1")
    assert measured(scene, "raas:page_size=4:sharing=layer:r=1") == pytest.approx(per_head)


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_policy_and_budget(monkeypatch, capsys):
    words = ["recall", "--policies", "dense,recency", "--budgets", "200,260", "--size", "s", "-n", "1"]
    monkeypatch.setattr("sys.argv", words)
    recall.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["policy"], row["budget"], row["problems"]) for row in rows] == [
        ("dense", 200, 4), ("dense", 260, 4), ("recency", 200, 4), ("recency", 260, 4)
    ]  # fmt: skip
    assert rows[0]["mean"] == pytest.approx(1, abs=1e-4) and 0 < rows[2]["mean"] <= rows[3]["mean"] <= 1.0001
