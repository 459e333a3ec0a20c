"""docs/cluster.md: its estimates follow from its own formula."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
TOKENS = 200 * (500 + 2500 + 8000) * 21
MODELS = {"Qwen2.5-7B": 7.62e9, "Qwen2.5-32B": 32.8e9}
"""Parameters, from the model cards."""


def test_the_tokens_of_the_study():
    assert f"{TOKENS / 1e6:.1f} million tokens" in PAGE
    assert 7 * 100 * 880 == 616_000 and round(616_000 / 300, -1) == 2050


@pytest.mark.parametrize("model", MODELS)
def test_a_row_follows_from_the_formula(model):
    row = re.search(rf"^\| {re.escape(model)}, (\d+) layers, (\d+) KV heads \|(.+)\|$", PAGE, re.MULTILINE)
    layers, heads = int(row[1]), int(row[2])
    weights, per_token, rows, held, rate, hours, tenth = (
        float(cell.strip().removesuffix(" GB").replace(",", "")) for cell in row[3].split("|")
    )
    assert weights == round(2 * MODELS[model] / 1e9, 1)
    assert per_token == 2 * layers * heads * 128 * 2 / 1024
    total_held = rows * (1024 + 200) * per_token * 1024
    assert held == round(total_held / 1e9, 1)
    assert (2 * MODELS[model] + total_held) / 1e9 < 80, "it fits"
    bound = rows * 3.35e12 / (2 * MODELS[model] + total_held)
    assert rate == pytest.approx(bound, rel=0.005)
    assert hours == round(TOKENS / bound / 3600, 1) and tenth == round(10 * TOKENS / bound / 3600, 1)
