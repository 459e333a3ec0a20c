"""Layers that read the keys and values of other layers, with and without a window (Gemma 3n, Gemma 4)."""

import pytest
import torch

import longthink
from longthink.errors import UnsupportedFeatureError, UnsupportedModelError
from longthink.lab.evaluate.forced import ForcedDecode
from tests.families.tiny import tiny
from tests.models import prompt

AMPLE, TIGHT = dict(decode_budget=64), dict(decode_budget=8)
POLICIES = ("recency:page_size=4", "h2o:pin_prompt=True", "quest:page_size=4", "dense")
GREEDY = dict(max_new_tokens=12, do_sample=False)
IDS, MASK = prompt((21, 13))


def given(policy, budget):
    return {"policy": policy} | ({} if policy.startswith("dense") else budget)


@pytest.fixture(scope="module", params=["gemma3n_text", "gemma4_text"])
def model(request):
    more = {"gemma4_text": dict(num_kv_shared_layers=2, hidden_size_per_layer_input=8), "gemma3n_text": {}}
    return tiny(request.param, **more[request.param]).double()


def later(text):
    return torch.cat([text, torch.tensor([[5, 6, 7, 8]] * len(text))], 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_transformers_in_every_turn(model, policy):
    expected = model.generate(IDS, attention_mask=MASK, **GREEDY)
    mask = torch.cat([MASK, torch.ones(2, 16)], 1).long()
    with longthink.make_cache(model, **given(policy, AMPLE)) as cache:
        assert model.generate(IDS, attention_mask=MASK, past_key_values=cache, **GREEDY).equal(expected)
        found = model.generate(later(expected), attention_mask=mask, past_key_values=cache, **GREEDY)
    assert found.equal(model.generate(later(expected), attention_mask=mask, **GREEDY))


def test_every_token_of_a_later_turn_reads_what_is_before_it(model):
    """Tokens say it of the last one only: nothing reads what the others have become in these layers."""
    mask = torch.cat([MASK, torch.ones(2, 4)], 1).long()
    with longthink.make_cache(model, **given(POLICIES[0], AMPLE)) as cache, torch.no_grad():
        expected = model(later(IDS), attention_mask=mask).logits[:, -4:]
        model(IDS, attention_mask=MASK, past_key_values=cache)
        found = model(later(IDS)[:, -4:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, expected)


def test_they_are_held_once(model):
    with longthink.make_cache(model, **given(POLICIES[0], AMPLE)) as cache:
        model.generate(IDS, past_key_values=cache, **GREEDY)
        assert (len(cache.paged), len(cache.windows), len(cache.layers)) == (1, 1, 4)


def test_a_prompt_in_chunks_is_read_as_one(model):
    # h2o drops tokens of the prompt once it is read, and every layer has read them all.
    options = dict(policy="h2o", budget=16)
    expected = longthink.generate(model, IDS[:1], **options, **GREEDY)
    assert longthink.generate(model, IDS[:1], prefill_chunk_size=8, **options, **GREEDY).equal(expected)


def test_an_engine_gives_the_tokens_of_each_row_alone(model):
    rows = IDS[0], IDS[1, 8:], IDS[0, :9]
    with longthink.Engine(model, seats=2, **given(POLICIES[0], TIGHT)) as engine:
        found = [engine.submit(row, max_new_tokens=12) for row in rows]
        for row, handle in zip(rows, found, strict=True):
            alone = longthink.generate(model, row[None], **given(POLICIES[0], TIGHT), **GREEDY)
            assert list(handle.result().tokens) == alone[0, len(row) :].tolist()


def test_a_turn_that_needs_evictions_is_refused(model):
    with longthink.make_cache(model, policy="recency:page_size=4", budget=36) as cache:
        text = model.generate(IDS[:1], past_key_values=cache, **GREEDY)
        with pytest.raises(UnsupportedFeatureError, match="layers share keys and values"):
            model.generate(later(text), past_key_values=cache, **GREEDY)


def test_what_is_not_served_says_so(model):
    with pytest.raises(UnsupportedModelError, match="kv_bits"):
        longthink.make_cache(model, decode_budget=128, kv_bits=4)
    with pytest.raises(UnsupportedFeatureError, match="keys and values of others"):
        longthink.generate(model, IDS[:1], **AMPLE, compile=True, **GREEDY)
    with longthink.make_cache(model, **AMPLE) as cache, torch.no_grad():
        model(IDS, past_key_values=cache)
        with pytest.raises(UnsupportedFeatureError, match="token by token"):
            ForcedDecode(model, cache)
