"""A fast-forwarded cache is, for time and memory, a decoded one, and decoding goes on from it."""

import pytest
import torch

from longthink.cache import LayerCache, Rotation
from longthink.cache.forward import fast_forward
from longthink.cache.step import evictable_pages
from longthink.config import Budget
from longthink.errors import CacheStateError, UnsupportedFeatureError
from longthink.policies import Dense, available_policies, make_policy, needs_budget
from tests.grids import slow_but

HEADS, KV_HEADS, DIM, PROMPT, BUDGET = 4, 2, 8, 20, 64
POLICIES = [*available_policies(), "raas:pin_prompt=False", "streaming_llm:sinks=24", "quest:page_size=4"]
CONTIGUOUS = ["recency", "recency:page_size=16", "streaming_llm"]
LENGTHS, FURTHER = [1, 12, 45, 64, 120], 20


def numbers(heads, tokens, seed):
    return torch.randn(2, heads, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def prompted(policy):
    made = make_policy(policy)
    budget = Budget(budget=BUDGET) if needs_budget(made) else None
    layer = LayerCache(made, budget, rotation=Rotation(torch.ones(DIM // 2)))
    layer.attend(numbers(HEADS, PROMPT, 0), numbers(KV_HEADS, PROMPT, 1), numbers(KV_HEADS, PROMPT, 2))
    return layer


def decode(layer, tokens, seed=3):
    for i in range(tokens):
        key = numbers(KV_HEADS, 1, seed + i)
        layer.attend(numbers(HEADS, 1, seed + i), key, key)


def forward(layer, tokens):
    fast_forward(layer, tokens, heads=HEADS, generator=torch.Generator().manual_seed(9))
    return layer


def cost(layer):
    """What time and memory depend on: shapes, lengths, what is resident, where the tail stands."""
    store, table = layer._store, layer._store.table
    return {
        "shapes": [(tuple(tensor.shape), tensor.dtype, tensor.stride()) for tensor in store.tensors()],
        "lengths": layer.length_B.tolist(),
        "caps": layer.rows.caps,
        "now": table.now_B.tolist(),
        "prompt": table.prompt_B.tolist(),
        "pages": (table.page_BKP >= 0).sum(-1).tolist(),
        "resident": table.resident_BKS.sum(-1).tolist(),
        "evicted": layer.num_evicted,
        "tail": table.page_BKP.amax(-1).tolist(),
        "evictable": evictable_pages(layer.policy, table).sum(-1).tolist(),
        "bytes": (layer.kv_bytes, layer.metadata_bytes),
    }


def decoded_to(policy, lengths):
    """One cache, at each of these lengths."""
    layer, here = prompted(policy), 0
    for tokens in lengths:
        decode(layer, tokens - here)
        yield tokens, layer
        here = tokens


@pytest.mark.parametrize("policy", slow_but(POLICIES, "dense", "raas", "h2o"))
def test_the_state_that_costs_is_that_of_a_decoded_cache(policy):
    further = sorted({*LENGTHS, *(tokens + FURTHER for tokens in LENGTHS)})
    slow = {tokens: cost(layer) for tokens, layer in decoded_to(policy, further)}
    for tokens in LENGTHS:
        layer = forward(prompted(policy), tokens)
        assert cost(layer) == slow[tokens]
        decode(layer, FURTHER)
        for name in ("evicted", "shapes"):
            assert cost(layer)[name] == slow[tokens + FURTHER][name]


@pytest.mark.parametrize("policy", CONTIGUOUS)
def test_a_window_holds_the_same_tokens(policy):
    for tokens, decoded in decoded_to(policy, LENGTHS):
        assert forward(prompted(policy), tokens).resident_positions() == decoded.resident_positions()


@pytest.mark.parametrize("policy", POLICIES)
def test_many_short_ways_lead_where_one_long_way_does(policy):
    steps = prompted(policy)
    for tokens in (0, 7, 90, 33, 1, 203):
        forward(steps, tokens)
    assert cost(steps) == cost(forward(prompted(policy), 334))


@pytest.mark.parametrize("policy", POLICIES)
def test_representatives_cover_their_pages(policy):
    layer = forward(prompted(policy), 300)
    table, size, store = layer._store.table, layer.policy.page_size, layer._store
    keys = layer._store.keys_BKSD.unflatten(2, (-1, size))
    resident = table.resident_BKS.expand(-1, KV_HEADS, -1).unflatten(2, (-1, size))[..., None]
    if store.has_key_bounds:
        used = resident.any(3)
        assert (
            torch.where(resident, keys, torch.inf).amin(3)[used[..., 0]].equal(table.kmin_BKPD[used[..., 0]])
        )
        assert (
            torch.where(resident, keys, -torch.inf).amax(3)[used[..., 0]].equal(table.kmax_BKPD[used[..., 0]])
        )


@pytest.mark.parametrize("policy", ["dense", "raas", "recency", "h2o"])
def test_the_next_step_attends_to_all_that_is_held(policy):
    layer = forward(prompted(policy), 200)
    query, key = numbers(HEADS, 1, 5), numbers(KV_HEADS, 1, 6)
    out = layer.attend(query, key, key)
    assert all(219 + 1 in head for row in layer.resident_positions() for head in row)
    store = layer._store
    resident = store.table.resident_BKS.expand(-1, KV_HEADS, -1)
    for row in range(2):
        for head in range(HEADS):
            kept = resident[row, head // 2]
            keys, values = (t[row, head // 2][kept] for t in (store.keys_BKSD, store.values_BKSD))
            weights = (keys @ query[row, head, 0] * DIM**-0.5).softmax(0)
            torch.testing.assert_close(out[row, head, 0], weights @ values)


def test_stamps_keep_their_order_and_stay_behind_the_clock():
    layer = forward(prompted("raas"), 400)
    stamp = layer._store.table.state["stamp"]
    assert stamp.max() <= 419
    decode(layer, 1)
    assert (layer._store.table.state["stamp"] == 420).sum(-1).min() >= 2


def test_what_cannot_be_done_right_is_refused():
    with pytest.raises(CacheStateError, match="after prefill"):
        forward(LayerCache(Dense()), 10)
    layer = prompted("dense")
    layer.attend(
        numbers(HEADS, 1, 1),
        numbers(KV_HEADS, 1, 1),
        numbers(KV_HEADS, 1, 1),
        torch.tensor([[True], [False]]),
    )
    with pytest.raises(CacheStateError, match="equal length"):
        forward(layer, 10)
    with pytest.raises(ValueError, match="tokens=-1 is out of range"):
        forward(prompted("dense"), -1)


def test_a_growing_cache_with_a_state_of_its_own_is_refused():
    layer = prompted("dense")
    layer._store.table.state["age"] = torch.zeros(2, KV_HEADS, 2)
    with pytest.raises(UnsupportedFeatureError, match="has state in a cache that grows"):
        forward(layer, 10)
