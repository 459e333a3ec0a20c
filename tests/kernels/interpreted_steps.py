"""A hundred decode steps with the kernels give what a `LayerCache` gives. Run by `test_in_interpreter`."""

import pytest
import torch

from longthink.cache import LayerCache
from longthink.config import Budget
from longthink.kernels import reference_step, triton_book, triton_step
from longthink.policies import make_policy
from tests.kernels.steps import FusedLayer

STEPS = 100
POLICIES = {
    "raas:page_size=4": 1,
    "raas:page_size=4:score=exact:sharing=layer": 2,
    "raas:page_size=4:used=alpha:alpha=0.1:pin_prompt=false": 1,
    "milestone:page_size=4:alpha=0.1:young=8": 1,
    "quest:page_size=4": 1,
    "recency:page_size=4": 1,
    "h2o": 1,
}


def layers(spec, heads, groups, dim):
    """Two equal layers that have read a prompt."""
    policy, lengths = make_policy(spec), (9, 14)
    budget = Budget(budget=20) if policy.grows else Budget(decode_budget=24)
    both = LayerCache(policy, budget), LayerCache(policy, budget)
    valid = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    prompt = [torch.randn(len(lengths), h, max(lengths), dim) for h in (heads * groups, heads, heads)]
    for layer in both:
        layer.attend(*prompt, valid)
        if policy.grows:  # the slots of all steps are there from the start
            layer._store.reserve((max(lengths) + STEPS) // policy.page_size + 1)
    return both


def check(spec, attention, book):
    """Run a layer and its fused copy side by side: same outputs, same tokens in the same slots, same state."""
    torch.manual_seed(len(spec))
    heads, groups, dim = POLICIES[spec], 3, 16
    layer, copy = layers(spec, heads, groups, dim)
    table, other = layer._store.table, FusedLayer(copy, attention, book)
    for step in range(STEPS):
        query, key, value = (torch.randn(2, h, 1, dim) for h in (heads * groups, heads, heads))
        # Some look for their own key, so that attention is not flat.
        query[:, 0] = 6 * key[:, 0] if step % 3 else query[:, 0]
        wanted = layer.attend(query, key, value)[:, :, 0].unflatten(1, (heads, groups))
        grouped = query[:, :, 0].unflatten(1, (heads, groups))
        got, score = other.step(grouped, key[:, :, 0], value[:, :, 0], dim**-0.5)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(other.store.table.position_BKS, table.position_BKS), step
        # Stamps are part of the bookkeeping; what the attention itself learns must not wait for it.
        for name in table.state.keys() - {"stamp"}:
            torch.testing.assert_close(other.store.table.state[name], table.state[name], atol=1e-4, rtol=1e-5)
        other.keep_house(score)
        if "stamp" in table.state:
            assert torch.equal(other.store.table.state["stamp"], table.state["stamp"]), step
    assert layer.policy.grows or layer.num_evicted > 50 * heads


@pytest.mark.parametrize("spec", POLICIES)
def test_kernels(spec):
    check(spec, triton_step, triton_book)


@pytest.mark.parametrize("spec", POLICIES)
def test_definition(spec):
    check(spec, reference_step, reference_step)
