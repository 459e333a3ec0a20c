"""What cannot work says so in one clear error, and leaves model and process as they were."""

import gc

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    MambaConfig,
    MistralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import longthink
from tests.models import build, prompt

TINY = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
)


def texts(model):
    """What the library writes with its own cache, and with one that evicts."""
    ids, mask = prompt((20, 9))
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    ours = longthink.generate(model, ids, mask, budget=20, policy="h2o", max_new_tokens=8, do_sample=False)
    return plain.tolist(), ours.tolist()


@pytest.fixture(scope="module")
def model():
    """A model that writes behind all tests what it wrote before them."""
    model = build("qwen2")
    before = texts(model)
    yield model
    assert texts(model) == before


@pytest.fixture(autouse=True)
def model_stays_as_it_was(model):
    """After each test the model has the attention that it came with."""
    yield
    if model.config._attn_implementation != "sdpa":
        gc.collect()
    assert model.config._attn_implementation == "sdpa"


REFUSED_MODELS = {
    "a window of 16 tokens in every layer.*transformers' own cache": lambda: AutoModelForCausalLM.from_config(
        MistralConfig(**TINY, sliding_window=16)
    ),
    "no layer with attention.*transformers' own cache": lambda: AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8)
    ),
    "encoder and a decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    ),
}


@pytest.mark.parametrize("reason", REFUSED_MODELS)
def test_models_that_would_be_served_wrongly_are_refused_before_anything_is_generated(reason):
    refused = REFUSED_MODELS[reason]().eval()
    calls = []
    refused.register_forward_hook(lambda *_: calls.append(1))
    before = refused.config._attn_implementation
    with pytest.raises(longthink.UnsupportedModelError, match=reason):
        longthink.generate(refused, torch.tensor([[3, 4, 5]]), budget=64, max_new_tokens=4)
    assert not calls
    assert refused.config._attn_implementation == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "exactly one|needs a budget"),
        (dict(budget=64, decode_budget=64), "exactly one"),
        (dict(budget=0), r"budget=0 is out of range: allowed is >= 1"),
        (dict(budget=64.5), "budget=64.5 must be an integer"),
        (dict(decode_budget=-3), "decode_budget=-3"),
        (dict(budget=True), "budget=True must be an integer"),
        (dict(policy="dense", budget=64), "keeps everything"),
        (dict(policy="raaas", budget=64), "unknown policy 'raaas'.*raas"),
        (dict(policy="raas:q=1", budget=64), "no option 'q'.*page_size"),
        (dict(policy="raas:r=2", budget=64), "r=2.0 is out of range: allowed is 0.0 to 1.0"),
        (dict(policy="raas:r=half", budget=64), "r='half' must be a number"),
        (dict(policy="raas:page_size=7", budget=64), "page_size=7 is not one of 1, 4, 8, 16, 32"),
        (dict(policy="raas:pin_prompt=maybe", budget=64), "pin_prompt='maybe' must be true or false"),
        (dict(policy="raas:r", budget=64), "must read field=value"),
        (dict(policy=3, budget=64), "policy=3 must be a name"),
        (dict(policy="raas:r=0.5:r=0.6", budget=64), "option 'r' of 'raas:r=0.5:r=0.6' is given twice"),
    ],
)
def test_bad_arguments_name_field_value_and_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        longthink.generate(model, prompt((5,))[0], max_new_tokens=2, **options)


def test_prompt_that_does_not_fit_says_the_numbers_and_what_to_do(model):
    message = r"budget=64 holds 8 pages of 8 tokens.*needs 10 for a prompt of 70 tokens.*budget >= 80.*decode_budget"
    with pytest.raises(longthink.BudgetError, match=message):
        longthink.generate(model, prompt((70,))[0], budget=64, max_new_tokens=4)


def test_smallest_budget_of_the_message_is_enough(model):
    ids, _ = prompt((70,))
    tokens = longthink.generate(model, ids, budget=80, max_new_tokens=100, do_sample=False)
    assert tokens.shape == (1, 170)


def test_prompt_that_does_not_fit_leaves_the_cache_usable(model):
    with longthink.make_cache(model, budget=64) as cache:
        with pytest.raises(longthink.BudgetError):
            model.generate(prompt((70,))[0], past_key_values=cache, max_new_tokens=4)
        tokens = model.generate(prompt((20,))[0], past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 24)


@pytest.mark.parametrize(
    "options",
    [
        dict(prompt_lookup_num_tokens=3),
        dict(use_cache=False),
        dict(output_attentions=True, return_dict_in_generate=True),
        dict(cache_implementation="static"),
        dict(custom_generate=lambda *_, **__: None),
    ],
)
def test_ways_of_decoding_that_would_be_wrong_are_refused(model, options):
    with pytest.raises(longthink.UnsupportedFeatureError, match=next(iter(options))):
        longthink.generate(model, prompt((5,))[0], budget=64, max_new_tokens=4, **options)


def test_assisted_decoding_is_refused(model):
    with pytest.raises(longthink.UnsupportedFeatureError, match="assisted decoding"):
        longthink.generate(model, prompt((5,))[0], budget=64, max_new_tokens=4, assistant_model=model)
    with (
        longthink.make_cache(model, budget=64) as cache,
        pytest.raises(longthink.UnsupportedFeatureError, match="assisted decoding"),
    ):
        model.generate(prompt((5,))[0], past_key_values=cache, max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_foreign_cache_and_contradictions_with_a_live_cache(model):
    ids, _ = prompt((5,))
    with pytest.raises(longthink.UnsupportedFeatureError, match="DynamicCache is not a longthink cache"):
        longthink.generate(model, ids, past_key_values=DynamicCache(), max_new_tokens=2)
    with longthink.make_cache(model, budget=64) as cache:
        with pytest.raises(ValueError, match="has its own budget"):
            longthink.generate(model, ids, past_key_values=cache, budget=64, max_new_tokens=2)
        with pytest.raises(ValueError, match="has policy 'recall', not 'h2o'"):
            longthink.generate(model, ids, past_key_values=cache, policy="h2o", max_new_tokens=2)


@pytest.mark.parametrize("fault", [RuntimeError("boom"), KeyboardInterrupt()])
def test_interrupted_step_is_noticed_and_leaves_the_model_usable(model, fault):
    ids, _ = prompt((20,))
    cache = longthink.make_cache(model, budget=64)
    steps = []

    def fail(*_):
        steps.append(1)
        if len(steps) == 5:
            raise fault

    hook = model.model.layers[0].mlp.register_forward_hook(fail)
    try:
        with pytest.raises(type(fault)):
            longthink.generate(model, ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    finally:
        hook.remove()
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(longthink.CacheStateError, match="interrupted"):
        longthink.generate(model, ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
    cache.reset()
    tokens = longthink.generate(model, ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert torch.equal(tokens, longthink.generate(model, ids, budget=64, max_new_tokens=20, do_sample=False))


def test_nan_weights_give_an_error_and_no_text(model):
    broken = build("qwen2")
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(longthink.NonFiniteError, match="NaN after 20 tokens"):
        longthink.generate(broken, prompt((20,))[0], budget=64, max_new_tokens=4)


def test_users_own_logits_processors_still_run(model):
    def only_seven(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([7]), 0.0)

    ids, _ = prompt((5,))
    processors = LogitsProcessorList([only_seven])
    tokens = longthink.generate(
        model, ids, budget=64, max_new_tokens=4, do_sample=False, logits_processor=processors
    )
    assert tokens[0, 5:].tolist() == [7] * 4
    assert len(processors) == 1


def test_closed_cache_is_refused_instead_of_giving_wrong_text(model):
    cache = longthink.make_cache(model, budget=64)
    cache.close()
    with pytest.raises(longthink.CacheStateError, match=r"closed.*cache\.open"):
        model.generate(prompt((5,))[0], past_key_values=cache, max_new_tokens=2)


def test_changed_attention_implementation_is_noticed(model):
    with longthink.make_cache(model, budget=64) as cache:
        model.set_attn_implementation("eager")
        with pytest.raises(longthink.CacheStateError, match="attention implementation was changed"):
            model.generate(prompt((5,))[0], past_key_values=cache, max_new_tokens=2)
    # What was set last is what the caller wants.
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")


def test_other_number_of_rows_is_refused(model):
    with longthink.make_cache(model, budget=64, batch_size=2) as cache:
        with pytest.raises(longthink.CacheStateError, match="batch_size=2 and was given 1"):
            model.generate(prompt((5,))[0], past_key_values=cache, max_new_tokens=2)
    with longthink.make_cache(model, budget=64) as cache, torch.no_grad():
        model(prompt((5, 5))[0], past_key_values=cache)
        with pytest.raises(longthink.CacheStateError, match="holds 2 rows and was given 1"):
            model(prompt((5,))[0], past_key_values=cache)


def test_masks_that_are_more_than_padding_are_refused(model):
    ids, _ = prompt((6,))
    prefix_mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with longthink.make_cache(model, budget=64) as cache, torch.no_grad():
        with pytest.raises(longthink.UnsupportedFeatureError, match="more than causal"):
            model(ids, attention_mask=prefix_mask, past_key_values=cache)


def test_cropping_is_refused(model):
    with longthink.make_cache(model, budget=64) as cache, torch.no_grad():
        model(prompt((6,))[0], past_key_values=cache)
        with pytest.raises(longthink.UnsupportedFeatureError, match="cannot be cropped"):
            cache.crop(-2)
