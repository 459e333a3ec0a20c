"""The self-check refuses what would be served wrongly, and leaves all other models as they were."""

import copy
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaAttention

import longthink
from longthink.hf import self_check
from tests.models import ARCHITECTURES, TINY, build, prompt
from tests.vision import build_vision

GREEDY = dict(max_new_tokens=6, do_sample=False)
SIZES = TINY | dict(num_hidden_layers=2)


def tiny(kind: str, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | more)).eval()


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    """No kind of model has been checked, and the machine is not too slow to check it."""
    monkeypatch.setattr(self_check, "_passed", {})
    monkeypatch.setattr(self_check, "_SECONDS", 600.0)


def encode_all(model):
    """Make the attention of a model bidirectional, in a way that no mask shows."""
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


@pytest.fixture
def logits(monkeypatch):
    """The models that the check runs, with and without us."""
    runs, compute = [], self_check._alone

    def counted(model, cache):
        runs.append(model)
        return compute(model, cache)

    monkeypatch.setattr(self_check, "_alone", counted)
    return runs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_supported_models_pass(architecture, dtype, logits):
    model = build(architecture).to(dtype)
    longthink.make_cache(model, budget=64).close()
    assert len(logits) == 2


HEADS = {"head_dim": 16}
KINDS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "smollm3": {},
    "cohere": {},
    "cohere2": {"layer_types": ["full_attention"] * 2},
    "ernie4_5": {},
    "helium": HEADS,
    "nanochat": {},
    "glm": HEADS,
    "glm4": HEADS,
    "olmo": {},
    "olmo2": {},
    "phi": {},
    "phi3": {"sliding_window": None},
    "granite": {},
    "gpt_neox": {},
    "starcoder2": {"sliding_window": None},
    "gemma": HEADS,
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_more_models_pass_and_generate_the_same(kind, logits):
    model = tiny(kind, **KINDS[kind])
    ids, mask = prompt((20, 13))
    ids = ids.clamp(max=95)
    model.generation_config.pad_token_id = 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(longthink.generate(model, ids, mask, policy="dense", **GREEDY), expected)
    assert len(logits) == 2


def test_vision_models_are_checked_on_text(logits):
    longthink.make_cache(build_vision("qwen2_vl"), budget=64).close()
    assert len(logits) == 2


@pytest.mark.slow
def test_attention_in_two_calls_is_served_as_one(light_compiler):
    """DiffLlama attends to two halves of the values with the same weights; other such layers are refused."""
    model = tiny("diffllama").double()
    ids, mask = prompt((20, 13))
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    for how in (False, True):
        assert torch.equal(longthink.generate(model, ids, mask, budget=64, compile=how, **GREEDY), expected)
    more = GREEDY | {"max_new_tokens": 40, "return_dict_in_generate": True}
    bounded = longthink.generate(model, ids, mask, budget=32, **more)
    assert bounded.past_key_values.num_evicted > 0
    type(model.model.layers[0].self_attn).__name__ = "Other"
    try:
        with pytest.raises(longthink.UnsupportedModelError, match="attends twice to the keys"):
            longthink.generate(model, ids, mask, policy="dense", **GREEDY)
    finally:
        type(model.model.layers[0].self_attn).__name__ = "DiffLlamaAttention"


def test_bidirectional_models_are_refused():
    with pytest.raises(longthink.UnsupportedModelError, match="the attention mask is more than causal"):
        longthink.make_cache(tiny("llama", is_causal=False), budget=64)


def test_what_no_mask_shows_is_refused_in_numbers():
    model = encode_all(build("llama"))
    with pytest.raises(
        longthink.UnsupportedModelError, match=r"off by \d+\.\d% of their spread.*SELF_CHECK=0"
    ):
        longthink.make_cache(model, budget=64)
    assert model.config._attn_implementation == "sdpa"
    assert not model.training


class ScaledAttention(LlamaAttention):
    """Does to the attention output what longthink cannot know: only without it."""

    def forward(self, *args, past_key_values=None, **kwargs):
        out, weights = super().forward(*args, past_key_values=past_key_values, **kwargs)
        return out * (1.0 if isinstance(past_key_values, longthink.PagedCache) else 1.5), weights


class FailsWithUs(LlamaForCausalLM):
    def forward(self, *args, past_key_values=None, **kwargs):
        if isinstance(past_key_values, longthink.PagedCache):
            raise KeyError("key_cache")
        return super().forward(*args, past_key_values=past_key_values, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_of_any_kind_is_refused(dtype):
    model = build("llama").to(dtype)
    for layer in model.model.layers:
        layer.self_attn.__class__ = ScaledAttention
    with pytest.raises(longthink.UnsupportedModelError, match="computes something else"):
        longthink.make_cache(model, budget=64)


def test_a_model_that_fails_with_our_cache_only_is_refused():
    with pytest.raises(longthink.UnsupportedModelError, match="fails with one: KeyError: 'key_cache'"):
        longthink.make_cache(FailsWithUs(LlamaConfig(**SIZES)), budget=64)


def test_a_model_that_does_not_run_on_text_alone_is_not_checked(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: 1 / 0)
    longthink.make_cache(model, budget=64).close()


def test_damaged_weights_are_reported_when_they_are_used():
    model = build("llama")
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(longthink.NonFiniteError):
        longthink.generate(model, prompt((20,))[0], budget=64, **GREEDY)


def test_it_can_be_turned_off(monkeypatch, logits):
    monkeypatch.setenv("LONGTHINK_SELF_CHECK", "0")
    longthink.make_cache(tiny("llama", is_causal=False), budget=64).close()
    assert not logits


def test_it_runs_once_per_class_configuration_and_dtype(logits):
    def checked(model) -> bool:
        logits.clear()
        longthink.make_cache(model, budget=64).close()
        return bool(logits)

    assert checked(build("llama"))
    assert not checked(build("llama", seed=1))
    assert checked(build("llama").to(torch.bfloat16))
    assert checked(build("llama", num_hidden_layers=3))
    assert checked(build("qwen2"))
    with pytest.raises(longthink.UnsupportedModelError, match="computes something else"):
        longthink.make_cache(encode_all(build("llama")), budget=64)


def test_a_refused_model_is_refused_again():
    model = encode_all(build("llama"))
    for _ in range(2):
        with pytest.raises(longthink.UnsupportedModelError, match="computes something else"):
            longthink.make_cache(model, budget=64)


def test_large_models_on_a_cpu_are_not_checked(monkeypatch, logits, caplog):
    monkeypatch.setattr(self_check, "_expected_seconds", lambda model: 0.2)
    monkeypatch.setattr(self_check, "_SECONDS", 0.5)
    caplog.set_level("INFO", "longthink")
    longthink.make_cache(build("llama"), budget=64).close()
    assert not logits
    assert "skipped: one pass would take some 0.2 s" in caplog.text


def test_a_pass_is_expected_to_take_as_long_as_its_largest_matrix_has_a_share(monkeypatch):
    model = build("llama")
    sizes = [weight.numel() for weight in model.parameters()]
    clock = iter([0.0, 3.0, 3.0, 3.5])
    monkeypatch.setattr(self_check.time, "perf_counter", lambda: next(clock))
    assert self_check._expected_seconds(model) == pytest.approx(0.5 * sum(sizes) / max(sizes))


def slow(monkeypatch, seconds):
    compute = self_check._alone
    monkeypatch.setattr(self_check, "_alone", lambda *args: (time.sleep(0.1), compute(*args))[1])
    monkeypatch.setattr(self_check, "_SECONDS", seconds)


def test_slow_models_are_not_run_twice(monkeypatch, logits, caplog):
    slow(monkeypatch, 0.1)
    caplog.set_level("INFO", "longthink")
    longthink.make_cache(build("llama"), budget=64).close()
    assert len(logits) == 1
    assert "skipped: one pass takes 0." in caplog.text


def test_rather_slow_models_are_compared_on_one_text(monkeypatch, logits):
    monkeypatch.setattr(self_check, "_batch", lambda *args: 1 / 0)
    slow(monkeypatch, 0.8)
    longthink.make_cache(build("llama"), budget=64).close()
    with pytest.raises(longthink.UnsupportedModelError, match="computes something else"):
        longthink.make_cache(encode_all(build("qwen2")), budget=64)
    assert len(logits) == 4


def test_the_model_is_left_as_it_was():
    model = build("qwen2").train()
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    weights, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    longthink.make_cache(model, budget=64).close()
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_frequencies_of_a_long_text_stay():
    """Dynamic RoPE forgets them when a short text comes."""
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = build("llama", rope_parameters=parameters, max_position_embeddings=64)
    with torch.no_grad():
        model(prompt((100,))[0])
    long = model.model.rotary_emb.inv_freq.clone()
    longthink.make_cache(model, budget=64).close()
    assert torch.equal(model.model.rotary_emb.inv_freq, long)
    assert model.model.rotary_emb.max_seq_len_cached == 100


def test_a_model_that_always_says_use_cache_false_is_served():
    """And where the caller says it, the whole text comes again."""
    model = tiny("nanochat")
    ids, _ = prompt((20,))
    expected = model.generate(ids, **GREEDY)
    with longthink.make_cache(model, policy="dense") as cache:
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
        cache.reset()
        with pytest.raises(longthink.UnsupportedFeatureError, match="use_cache=False"):
            model.generate(ids, past_key_values=cache, use_cache=False, **GREEDY)
