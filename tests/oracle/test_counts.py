"""Shares such as 0.3 of 170 pages are counted as decimal numbers, whatever binary rounding makes of them."""

import math

import pytest
import torch

from longthink.kernels import top_fraction
from tests.oracle.base import exact_product
from tests.oracle.harness import Case, calls

SHARES = [hundredths / 100 for hundredths in range(1, 101)]
MOST_PAGES = 256


def test_top_fraction_counts_exactly() -> None:
    counts = torch.arange(1, MOST_PAGES + 1)
    page_BKP = torch.arange(MOST_PAGES).expand(MOST_PAGES, 1, MOST_PAGES)
    page_BKP = torch.where(page_BKP < counts[:, None, None], page_BKP, -1)
    for share in SHARES:
        used_BKP = top_fraction(torch.zeros(page_BKP.shape), page_BKP, share)
        assert used_BKP.sum(-1).flatten().tolist() == [
            math.ceil(exact_product(share, count)) for count in counts.tolist()
        ]


@pytest.mark.parametrize(("heavy", "budget"), [(0.29, 100), (0.53, 100), (0.84, 75), (0.5, 7)])
def test_h2o_splits_the_budget_exactly(heavy: float, budget: int) -> None:
    case = Case("h2o", {"heavy": heavy}, budget=budget, prompts=(2 * budget,), then=())
    layer = case.make_layer()
    prompt = next(calls(case))
    # All attention goes to the first half of the prompt: of the second half only the window stays.
    prompt.query_BHQD.fill_(64.0)
    prompt.key_BKQD.fill_(-64.0)
    prompt.key_BKQD[:, :, :budget] = 64.0
    prompt.attend(layer, None)
    window = budget - math.floor(exact_product(heavy, budget))
    late = [position for position in layer.resident_positions()[0][0] if position >= budget]
    assert late == list(range(2 * budget - window, 2 * budget))
