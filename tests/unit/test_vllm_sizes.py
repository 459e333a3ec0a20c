"""docs/vllm.md: the table of how many requests fit, recomputed."""

import re
from pathlib import Path

import pytest
import torch

from longthink.config import Budget
from longthink.policies import make_policy
from longthink.vllm.pool import page_bytes

PAGE = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
ROWS = re.findall(
    r"^\| (\d+) x (\d+) \(.*?\) \| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE
)
POOL, T, HEAD_DIM, PROMPT = 20 * 2**30, 16, 128, 1024


def kv_bytes(heads):
    return 2 * T * heads * HEAD_DIM * 2


def test_the_table_is_there():
    assert len(ROWS) == 3


@pytest.mark.parametrize("row", ROWS)
def test_row_of_the_table(row):
    layers, heads, kib, *fit = (int(cell.replace(",", "")) for cell in row)
    page = layers * page_bytes(make_policy("raas"), heads, HEAD_DIM, torch.bfloat16, kv_bytes(heads))
    assert round(page / 1024) == kib
    dense = [POOL // (layers * kv_bytes(heads)) // ((PROMPT + out) // T) for out in (8192, 32768)]
    bounded = [POOL // page // Budget(decode_budget=budget).pages(PROMPT, T) for budget in (1024, 4096)]
    assert fit == dense + bounded


@pytest.mark.parametrize(("policy", "percent"), [("raas", 7), ("milestone", 1)])
def test_share_of_the_policies_state(policy, percent):
    page = page_bytes(make_policy(policy), 4, HEAD_DIM, torch.bfloat16, kv_bytes(4))
    assert round(100 * (page / kv_bytes(4) - 1)) == percent
    assert f"{percent} % for `{policy}`" in PAGE
