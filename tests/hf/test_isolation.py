"""A request gives the same tokens alone, in a batch, with padding, and after other requests."""

import pytest
import torch

import longthink
from tests.grids import slow_but
from tests.models import PAD, prompt

POLICIES = [p for p in longthink.available_policies() if p != "dense"]


def run(model, ids, mask, policy):
    return longthink.generate(
        model, ids, mask, policy=policy, decode_budget=24, max_new_tokens=60, do_sample=False
    )[:, ids.shape[1] :]


@pytest.mark.parametrize("policy", slow_but(POLICIES, "milestone"))
def test_alone_and_in_a_batch(model, policy):
    ids, mask = prompt((31, 18, 5, 26))
    together = run(model, ids, mask, policy)
    for row in range(4):
        alone = ids[row : row + 1, mask[row].bool()]
        assert torch.equal(run(model, alone, torch.ones_like(alone), policy)[0], together[row])


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_left_padding_of_any_width(model, policy):
    ids, mask = prompt((22,))
    expected = run(model, ids, mask, policy)
    for width in (1, 16, 37):
        padded = torch.cat([torch.full((1, width), PAD), ids], 1)
        hidden = torch.cat([torch.zeros(1, width, dtype=torch.long), mask], 1)
        assert torch.equal(run(model, padded, hidden, policy), expected)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["raas", "milestone", "h2o", "quest", "random"])
def test_after_forty_other_requests(model, policy):
    ids, mask = prompt((22,))
    expected = run(model, ids, mask, policy)
    for seed in range(40):
        longthink.generate(
            model, prompt((5 + seed % 20,), seed)[0], policy=policy, decode_budget=8, max_new_tokens=12
        )
    assert torch.equal(run(model, ids, mask, policy), expected)
