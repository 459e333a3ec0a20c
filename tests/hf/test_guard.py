"""A text that is not decoded through the cache, or not within its bound, is reported by name, whatever the reason."""

import copy
import gc
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import longthink
from longthink.hf import DecodeStep, guard
from tests.models import build, prompt

GREEDY = dict(max_new_tokens=24, do_sample=False)


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture
def ids():
    return prompt((20,))[0]


def like(model, kind):
    """The model, with methods of another class."""
    other = build("llama")
    other.__class__ = kind
    return other


class DropsCache(LlamaForCausalLM):
    """Goes on with a cache of the library from 30 columns on, as transformers does in models with longrope."""

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        if input_ids.shape[1] >= 30 and isinstance(past_key_values, longthink.PagedCache):
            past_key_values = None
            kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)


class IgnoresCache(LlamaForCausalLM):
    """Has a cache of its own, from the first pass on."""

    def forward(self, *args, past_key_values=None, **kwargs):
        if kwargs.get("position_ids") is None or kwargs["position_ids"].min() == 0:
            self.own = DynamicCache()
        return super().forward(*args, past_key_values=self.own, **kwargs)


class StepsWithoutCache(LlamaForCausalLM):
    """Reads the prompt into the cache that it is given, and then only the last token."""

    def forward(self, input_ids, past_key_values=None, **kwargs):
        past_key_values = past_key_values if input_ids.shape[1] > 1 else DynamicCache()
        return super().forward(input_ids, past_key_values=past_key_values, **kwargs)


@pytest.fixture(params=[DropsCache, IgnoresCache, StepsWithoutCache])
def wrong(request, model, monkeypatch):
    # The self-check would find some of them.
    monkeypatch.setenv("LONGTHINK_SELF_CHECK", "0")
    return like(model, request.param)


def test_generate_raises(wrong, ids):
    with pytest.raises(longthink.CacheStateError, match="the model did not use the cache"):
        longthink.generate(wrong, ids, budget=64, **GREEDY)


def test_a_cache_of_ones_own_warns(wrong, ids):
    with pytest.warns(longthink.CacheUnusedWarning), longthink.make_cache(wrong, budget=64) as cache:
        wrong.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)


def test_the_engine_raises(wrong, ids):
    if isinstance(wrong, DropsCache):
        return  # the engine prepares its inputs itself
    with longthink.Engine(wrong, budget=64, compile=False) as engine, pytest.raises(longthink.EngineError):
        for _ in engine.submit(ids[0], max_new_tokens=8):
            pass


def test_a_cache_that_is_given_to_nobody_warns_when_it_is_closed(model, ids):
    with pytest.warns(longthink.CacheUnusedWarning, match="pass past_key_values=cache") as caught:
        with longthink.make_cache(model, budget=64):
            model.generate(ids, **GREEDY)
    assert [warning.filename for warning in caught] == [__file__]
    assert "decoded 23 tokens" in str(caught[0].message)


def test_a_cache_that_is_given_to_nobody_warns_when_it_is_collected(model, ids):
    cache = longthink.make_cache(model, budget=64)
    model.generate(ids, use_cache=False, **GREEDY)
    with pytest.warns(longthink.CacheUnusedWarning):
        del cache
        gc.collect()
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_goes_on_with_copies_warns(model, ids):
    def on_a_copy(module, args, kwargs):
        return args, kwargs | {"past_key_values": copy.deepcopy(kwargs["past_key_values"])}

    hook = model.register_forward_pre_hook(on_a_copy, with_kwargs=True)
    with pytest.warns(longthink.CacheUnusedWarning, match="never given a token"):
        with longthink.make_cache(model, budget=64) as cache:
            model.generate(ids, past_key_values=cache, **GREEDY)
    with pytest.raises(longthink.CacheStateError, match="did not use the cache"):
        longthink.generate(model, ids, budget=64, **GREEDY)
    hook.remove()


def test_another_cache_by_mistake_warns(model, ids):
    with pytest.warns(longthink.CacheUnusedWarning), longthink.make_cache(model, budget=64):
        model.generate(ids, past_key_values=DynamicCache(), **GREEDY)


def test_a_layer_that_misses_steps_raises(model, ids, monkeypatch):
    cache = longthink.make_cache(model, budget=64)
    with cache, torch.no_grad():
        model(ids, past_key_values=cache)
        step = DecodeStep(model, cache, compile=False)
        guard.check_run(cache, 20)
        monkeypatch.setattr(step._static.layers[1], "attend", lambda query, *rest: query)
        step(ids[:, :1])
        with pytest.raises(longthink.CacheStateError, match="layer 1 of the cache was not used in all steps"):
            guard.check_run(cache, 21)


def test_more_than_the_bound_raises(model, ids):
    """A policy, or a layer, that keeps what it should not."""
    with longthink.make_cache(model, budget=64) as cache:
        model.generate(ids, past_key_values=cache, max_new_tokens=80, do_sample=False)
        guard.check_bound(cache)
        cache.layers[1].slots.rows.caps[0] = 3
        with pytest.raises(longthink.CacheStateError, match=r"layer 1 .* beyond its bound of 24"):
            guard.check_bound(cache)


# What is right is silent ----------------------------------------------------------------------------------------


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", longthink.CacheUnusedWarning)
        yield


def test_other_caches_beside_ours_are_silent(model, ids, silent):
    dense = model.generate(ids, **GREEDY)
    with longthink.make_cache(model, budget=64) as cache:
        # Before, after, and in turn.
        model.generate(ids, **GREEDY)
        ours = model.generate(ids, past_key_values=cache, **GREEDY)
        model.generate(ids, **GREEDY)
        model.generate(ids, use_cache=False, **GREEDY)
        with torch.no_grad():
            model(ours, use_cache=False)
    with longthink.make_cache(model, budget=64) as cache, torch.no_grad():
        other = DynamicCache()
        for text in dense.split([20, *[1] * 24], 1):
            mine = model(text, past_key_values=cache).logits
            theirs = model(text, past_key_values=other).logits
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_two_caches_of_ours_in_turn_are_silent(model, ids, silent):
    with longthink.make_cache(model, budget=64) as one, longthink.make_cache(model, budget=64) as other:
        assert one.get_seq_length() == other.get_seq_length() == 0
        model.generate(ids, past_key_values=one, **GREEDY)
        model.generate(ids, past_key_values=other, **GREEDY)
        assert one.get_seq_length() == 43
        model.generate(prompt((60,))[0], past_key_values=other, **GREEDY)


def test_a_prompt_that_does_not_fit_is_silent(model, ids, silent):
    with longthink.make_cache(model, budget=16) as cache:
        with pytest.raises(longthink.BudgetError):
            model.generate(ids, past_key_values=cache, **GREEDY)
        model.generate(ids, **GREEDY)


def test_guidance_on_a_cache_is_refused_before_a_token_is_made(model, ids):
    with longthink.make_cache(model, budget=64) as cache:
        with pytest.raises(
            longthink.UnsupportedFeatureError, match=r"guidance_scale=1\.5 .* unbounded cache"
        ):
            model.generate(ids, past_key_values=cache, guidance_scale=1.5, **GREEDY)
        assert cache.columns == 20


def test_guidance_beside_a_cache_is_silent(model, ids, silent):
    expected = model.generate(ids, guidance_scale=1.5, **GREEDY)
    with longthink.make_cache(model, budget=64) as cache:
        model.generate(ids, past_key_values=cache, guidance_scale=1.0, **GREEDY)
        assert torch.equal(model.generate(ids, guidance_scale=1.5, **GREEDY), expected)


def test_an_error_is_not_hidden_by_a_warning(model, ids, silent):
    with pytest.raises(KeyError), longthink.make_cache(model, budget=64):
        model.generate(ids, **GREEDY)
        raise KeyError


def test_a_few_steps_are_silent(model, ids, silent):
    with longthink.make_cache(model, budget=64):
        model.generate(ids, max_new_tokens=8, do_sample=False)
        with torch.no_grad():
            for _ in range(40):
                model(ids, use_cache=False)


def test_dense_decoding_beside_an_engine_is_silent(model, ids, silent):
    with longthink.Engine(model, budget=64, compile=False):
        model.generate(ids, **GREEDY)


def test_a_copy_of_a_filled_cache_is_silent(model, ids, silent):
    with longthink.make_cache(model, budget=64) as cache:
        model.generate(ids, past_key_values=cache, **GREEDY)
        with copy.deepcopy(cache):
            model.generate(ids, **GREEDY)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_ways_of_decoding_pass_the_check(model, more, silent):
    ids, mask = prompt((20, 9))
    out = longthink.generate(model, ids, mask, decode_budget=32, **GREEDY | more)
    assert out.shape[1] == 44
    embeds = model.get_input_embeddings()(ids)
    assert longthink.generate(
        model, attention_mask=mask, inputs_embeds=embeds, decode_budget=32, **GREEDY | more
    ).shape[1] == 24  # fmt: skip


# Models whose positions change at a length ----------------------------------------------------------------------

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6, "factor": 4.0}


def longrope(kind: str, **more):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=None)
    config = CONFIG_MAPPING[kind](**sizes | {"rope_parameters": LONGROPE, "sliding_window": None} | more)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(params=["phi3", "phi3 with plain RoPE", "llama"])
def limited(request):
    if "plain" in request.param:
        return longrope("phi3", rope_parameters=None, original_max_position_embeddings=64)
    more = {"original_max_position_embeddings": 64} if request.param == "phi3" else {}
    return longrope(request.param, **more)


def test_up_to_the_limit_the_model_is_served(limited, ids, silent):
    expected = limited.generate(ids, max_new_tokens=45, do_sample=False)
    assert torch.equal(
        longthink.generate(limited, ids, policy="dense", max_new_tokens=45, do_sample=False), expected
    )
    with longthink.make_cache(limited, policy="recency", decode_budget=16) as cache:
        assert limited.generate(ids, past_key_values=cache, max_new_tokens=45).shape[1] == 65
        assert cache.num_evicted > 0
    with longthink.Engine(limited, budget=64, compile=False) as engine:
        assert len(engine.submit(ids[0], max_new_tokens=45).result().tokens) == 45


def test_beyond_the_limit_it_is_refused_before_a_token_is_made(limited, ids):
    steps = []
    handle = limited.register_forward_hook(lambda *args: steps.append(1))
    with pytest.raises(longthink.UnsupportedModelError, match="beyond 64 tokens"):
        longthink.generate(limited, ids, budget=64, max_new_tokens=46, do_sample=False)
    with pytest.raises(longthink.UnsupportedModelError, match="beyond 64 tokens"):
        longthink.generate(limited, prompt((70,))[0], budget=96, max_new_tokens=1)
    assert not steps
    handle.remove()
    with longthink.Engine(limited, budget=64, compile=False) as engine:
        with pytest.raises(longthink.UnsupportedModelError, match="beyond 64 tokens"):
            engine.submit(ids[0], max_new_tokens=46)


@pytest.mark.parametrize("columns", [20, 70])
def test_the_library_goes_on_in_no_way_beyond_the_limit(limited, columns):
    """The first pass beyond it raises: with the cache, and without where transformers drops it."""
    with longthink.make_cache(limited, policy="recency", decode_budget=16) as cache:
        with pytest.raises(longthink.UnsupportedModelError, match="beyond 64 tokens"):
            limited.generate(prompt((columns,))[0], past_key_values=cache, max_new_tokens=100)
        assert cache.columns <= 64


def test_a_later_turn_beyond_the_limit_is_refused(limited, ids):
    with longthink.make_cache(limited, policy="recency", decode_budget=16) as cache:
        text = limited.generate(ids, past_key_values=cache, max_new_tokens=10)
        with pytest.raises(longthink.UnsupportedModelError, match="beyond 64 tokens"):
            limited.generate(torch.cat([text, text, text], 1), past_key_values=cache, max_new_tokens=10)


def test_a_decode_step_beyond_the_limit_is_refused(limited):
    ids, _ = prompt((64,))
    with longthink.make_cache(limited, policy="recency", decode_budget=16) as cache, torch.no_grad():
        limited(ids, past_key_values=cache)
        with pytest.raises(longthink.UnsupportedModelError, match="beyond 64 tokens"):
            DecodeStep(limited, cache, compile=False)(ids[:, :1])


def test_other_models_have_no_limit(ids):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    for model in (build("llama"), build("llama", rope_parameters=yarn)):
        with longthink.make_cache(model, decode_budget=32) as cache:
            assert cache.binding.use.limit is None
            model.generate(ids, past_key_values=cache, max_new_tokens=80, do_sample=False)


# Gradients ------------------------------------------------------------------------------------------------------


def test_a_cache_keeps_no_graph(ids):
    model = build("llama")
    with longthink.make_cache(model, budget=64) as cache:
        logits = model(ids, past_key_values=cache).logits
        for _ in range(3):
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
        assert logits.requires_grad
        for layer in cache.layers:
            assert not any(tensor.requires_grad for tensor in layer.slots.store.tensors())
        with pytest.raises(longthink.UnsupportedFeatureError, match="gradients"):
            logits.sum().backward()


def test_logits_with_gradients_enabled_are_the_same(ids):
    model = build("llama")
    assert isinstance(model.config, LlamaConfig)
    with longthink.make_cache(model, budget=64) as cache, longthink.make_cache(model, budget=64) as other:
        with torch.no_grad():
            expected = model(ids, past_key_values=other).logits
        assert torch.equal(model(ids, past_key_values=cache).logits.detach(), expected)
