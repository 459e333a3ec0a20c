"""What binds a cache to its model: the wrong one is an error, and the model's attention stays what the caller set."""

import copy
import pickle

import pytest
import torch

import longthink
from longthink.hf import DecodeStep, attention
from tests.models import build
from tests.vision import build_vision

GREEDY = dict(max_new_tokens=6, do_sample=False)


pytestmark = pytest.mark.usefixtures("model_is_left_alone")


def test_a_cache_of_another_model_says_so(model, ids):
    other, longer = build("qwen2", seed=1), build("qwen2", num_hidden_layers=3)
    expected = longthink.generate(model, ids, budget=64, **GREEDY)
    with longthink.make_cache(model, budget=64) as cache:
        for wrong in (other, longer):
            with pytest.raises(longthink.CacheStateError, match="for another model"):
                longthink.generate(wrong, ids, past_key_values=cache, **GREEDY)
            with pytest.raises(longthink.CacheStateError, match="for another model"):
                DecodeStep(wrong, cache, compile=False)
            with pytest.raises(longthink.CacheStateError, match="for another model"):
                wrong.generate(ids, past_key_values=cache, **GREEDY)
            # Attention of the other one goes through longthink as well.
            with (
                longthink.make_cache(wrong, budget=64),
                pytest.raises(longthink.CacheStateError, match="for another model"),
            ):
                wrong.generate(ids, past_key_values=cache, **GREEDY)
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
    shorter = build("qwen2", num_hidden_layers=1)
    with longthink.make_cache(shorter, budget=64) as cache:
        with pytest.raises(longthink.CacheStateError, match="has 1 layers and was given keys of layer 1"):
            model.generate(ids, past_key_values=cache, **GREEDY)


def test_a_model_that_stores_two_keys_per_layer_is_refused(model):
    keys = torch.zeros(1, 2, 3, 16)
    with longthink.make_cache(model, budget=64) as cache:
        cache.update(keys, keys, 0)
        with pytest.raises(longthink.UnsupportedModelError, match=r"layer 0 .*more than one key per layer"):
            cache.update(keys, keys, 0)


def test_an_attention_implementation_that_is_set_while_a_cache_is_open_stays(ids):
    model = build("qwen2")
    with longthink.make_cache(model, budget=64) as cache:
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    with longthink.make_cache(model, budget=64) as cache:
        model.set_attn_implementation("sdpa")
        # Opening again means it, as the message says.
        assert model.generate(ids, past_key_values=cache.open(), **GREEDY).shape == (1, 26)
    assert model.config._attn_implementation == "sdpa"


def test_parts_of_a_model_get_their_own_implementations_back():
    model = build_vision("qwen2_vl")
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})
    with longthink.make_cache(model, budget=64):
        copied = copy.deepcopy(model)
    for one in (model, copied):
        assert one.config._attn_implementation == one.config.text_config._attn_implementation == "sdpa"
        assert one.config.vision_config._attn_implementation == "eager"


@pytest.mark.skipif(not attention._COMPILES_NAME, reason="torch < 2.13 cannot compile a subclass of str")
def test_a_copy_of_a_model_has_the_attention_that_the_model_came_with(model, ids):
    expected = model.generate(ids, **GREEDY)
    with longthink.make_cache(model, budget=64) as cache:
        copied, config = copy.deepcopy(model), pickle.loads(pickle.dumps(model.config))
        model.generate(ids, past_key_values=cache, **GREEDY)
    assert copied.config._attn_implementation == config._attn_implementation == "sdpa"
    assert torch.equal(copied.generate(ids, **GREEDY), expected)
    assert torch.equal(longthink.generate(copied, ids, budget=64, **GREEDY), expected)


def test_a_cache_can_be_copied_but_not_pickled(model, ids):
    with longthink.make_cache(model, policy="raas:page_size=4", budget=96) as cache:
        text = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
        other = copy.deepcopy(cache)
        more = torch.cat([text, ids], 1)
        ours = model.generate(more, past_key_values=cache, **GREEDY)
        assert torch.equal(model.generate(more, past_key_values=other, **GREEDY), ours)
        both = copy.deepcopy((model, other))
        model_of_both, cache_of_both = both
        assert cache_of_both.binding.model is model_of_both
        model_of_both.generate(torch.cat([ours, ids], 1), past_key_values=cache_of_both, **GREEDY)
        with pytest.raises(longthink.UnsupportedFeatureError, match="cannot be pickled"):
            pickle.dumps(cache)
    other.close()


def test_the_rows_asked_for_hold_in_every_way_into_a_step(model, ids):
    with longthink.make_cache(model, budget=64, batch_size=1) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        token = torch.tensor([[3], [4]])
        for step in (DecodeStep(model, cache, compile=False), lambda new: model(new, past_key_values=cache)):
            with pytest.raises(longthink.CacheStateError, match="batch_size=1 and was given 2 rows"):
                step(token)
