"""Ways of calling that transformers allows: served as it serves them, or refused before a token is made."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BatchEncoding, GenerationConfig

import longthink
from longthink.hf import generation as generation_module
from longthink.hf.generation import CHUNKS_LATER_TURNS
from tests.grids import by_day, covering, slow_but
from tests.models import PAD, build, prompt

POLICIES = longthink.available_policies()
ROOT = Path(__file__).parents[2]
GREEDY = dict(max_new_tokens=6, do_sample=False)


pytestmark = pytest.mark.usefixtures("model_is_left_alone")


def of_model(model, monkeypatch, **options):
    """Settings that come with a checkpoint."""
    for name, value in options.items():
        monkeypatch.setattr(model.generation_config, name, value)


# What is decided from -----------------------------------------------------------------------------------------


def test_settings_of_the_model_count_beside_a_generation_config(model, ids, monkeypatch):
    of_model(model, monkeypatch, num_beams=3)
    config = GenerationConfig(max_new_tokens=12, pad_token_id=PAD)
    theirs = model.generate(ids, generation_config=config)
    ours = longthink.generate(model, ids, budget=64, generation_config=config)
    assert torch.equal(ours, theirs)
    with pytest.raises(
        longthink.UnsupportedFeatureError, match="compile=True cannot be used with num_beams=3"
    ):
        longthink.generate(model, ids, budget=64, generation_config=config, compile=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("output_hidden_states", True), ("stop_strings", ["x"]), ("num_beams", 2), ("token_healing", True)],
)
def test_options_that_only_the_library_supports_are_left_to_its_loop(model, name, value, monkeypatch):
    monkeypatch.setattr(generation_module, "compiles", lambda *args, **options: True)

    def own_loop(compile="auto", **options):
        with longthink.make_cache(model, budget=64) as cache:
            return generation_module._compiles(model, cache, 1, compile, options)

    config = GenerationConfig(max_new_tokens=5)
    for given in (None, config):
        assert own_loop(generation_config=given, max_new_tokens=5)
        assert not own_loop(generation_config=given, **{name: value})
    setattr(config, name, value)
    assert not own_loop(generation_config=config)
    with pytest.raises(longthink.UnsupportedFeatureError, match=f"compile=True cannot be used with {name}="):
        own_loop(compile=True, generation_config=config)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_cache", False),
        ("guidance_scale", 1.5),
        ("prompt_lookup_num_tokens", 3),
        ("penalty_alpha", 0.6),
        ("force_words_ids", [[5]]),
        ("num_beam_groups", 2),
    ],
)
def test_what_would_be_wrong_is_refused_wherever_it_is_set(model, ids, monkeypatch, option, value):
    more = {
        "force_words_ids": {"num_beams": 2},
        "num_beam_groups": {"num_beams": 2, "diversity_penalty": 0.5},
    }
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    given = {option: value, **more.get(option, {})}
    named = {"force_words_ids": "constrained_beam_search", "num_beam_groups": "group_beam_search"}.get(
        option, option
    )
    config = GenerationConfig(max_new_tokens=3)
    with pytest.raises(longthink.UnsupportedFeatureError, match=named):
        longthink.generate(model, ids, budget=64, max_new_tokens=3, **given)
    of_model(model, monkeypatch, **given)
    with pytest.raises(longthink.UnsupportedFeatureError, match=named):
        longthink.generate(model, ids, budget=64, generation_config=config)
    hook.remove()
    assert not calls


def test_the_callers_word_goes_over_the_models(model, ids, monkeypatch):
    of_model(model, monkeypatch, use_cache=False)
    ours = longthink.generate(model, ids, budget=64, use_cache=True, **GREEDY)
    assert torch.equal(ours, model.generate(ids, **GREEDY))


def test_messages_print_no_module(model, ids):
    for options in (dict(assistant_model=model), dict(custom_generate=model), dict(policy=model, budget=64)):
        with pytest.raises(ValueError, match="Qwen2ForCausalLM") as caught:
            longthink.generate(model, ids, **dict(budget=64) | options)
        assert len(str(caught.value)) < 200
    with pytest.raises(ValueError, match="budget=<Qwen2ForCausalLM>"):
        longthink.make_cache(model, budget=model)


# The prompt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda ids, mask: ((ids.tolist(), mask.tolist()), {}),
        lambda ids, mask: ((BatchEncoding({"input_ids": ids, "attention_mask": mask}),), {}),
        lambda ids, mask: (({"input_ids": ids.tolist()}, mask), {}),
        lambda ids, mask: ((), {"inputs": ids, "attention_mask": mask}),
        lambda ids, mask: (
            (ids, mask),
            {"logits_processor": None, "stopping_criteria": None, "generation_config": None},
        ),
    ],
)
def test_forms_of_a_prompt(model, form):
    ids, mask = prompt((20, 9))
    words, options = form(ids, mask)
    ours = longthink.generate(model, *words, budget=64, **options, **GREEDY)
    assert torch.equal(ours, model.generate(ids, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("form", [lambda row: row, lambda row: row.tolist()])
def test_one_row_without_its_dimension(model, ids, form):
    ours = longthink.generate(model, form(ids[0]), budget=64, **GREEDY)
    assert torch.equal(ours, model.generate(ids, **GREEDY))


@pytest.mark.parametrize(
    ("with_ids", "compile"),
    slow_but(itertools.product((False, True), (False, True)), (False, False), (True, False)),
)
def test_embeddings_with_and_without_ids(model, ids, with_ids, compile, light_compiler):
    embeddings = model.get_input_embeddings()(ids)
    options = dict(inputs_embeds=embeddings, max_new_tokens=40, do_sample=False)
    words = (ids,) if with_ids else ()
    ours = longthink.generate(model, *words, policy="recency", budget=96, compile=compile, **options)
    assert torch.equal(ours, model.generate(*words, **options))


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (([[5, 6], [7]],), {}, "lists of equal length"),
        (("hello",), {}, "input_ids='hello' is not a tensor of token ids"),
        ((torch.ones(1, 3),), {}, r"input_ids of shape \(1, 3\) and type torch.float32"),
        ((torch.ones(1, 1, 3, dtype=torch.int64),), {}, r"shape \(1, 1, 3\)"),
        (([5],), {"inputs": [5]}, "given twice"),
        (({"input_ids": [5], "use_cache": True},), {"use_cache": True}, "use_cache is given twice"),
        ((), {"prefill_chunk_size": 4}, "needs the prompt as input_ids"),
    ],
)
def test_what_is_no_prompt(model, words, options, message):
    with pytest.raises(ValueError, match=message):
        longthink.generate(model, *words, budget=64, max_new_tokens=2, **options)


def test_a_turn_without_the_text_before_it_is_refused_and_harms_nothing(model, ids):
    question = prompt((4,), seed=1)[0]
    with longthink.make_cache(model, decode_budget=64) as cache:
        answer = longthink.generate(model, ids, past_key_values=cache, **GREEDY)
        for text in (question, answer[:, :-1], answer[:, 1:-1]):
            for more in ({}, {"prefill_chunk_size": 3}):
                with pytest.raises(ValueError, match="no token behind the 25 columns that the cache holds"):
                    longthink.generate(model, text, past_key_values=cache, **more, **GREEDY)
        # The library leaves nothing of the question, and the cache says why.
        with cache, pytest.raises(ValueError, match="no token behind the 25 columns"):
            model.generate(question, past_key_values=cache, **GREEDY)
        whole = torch.cat([answer, question], 1)
        found = longthink.generate(model, whole, past_key_values=cache, **GREEDY)
    assert torch.equal(found, model.generate(whole, **GREEDY))


@pytest.mark.parametrize("chunk", [None, 3] if CHUNKS_LATER_TURNS else [None])
def test_a_turn_of_new_tokens_whose_mask_covers_all_of_the_text(model, ids, chunk):
    question = prompt((4,), seed=1)[0]
    with longthink.make_cache(model, decode_budget=64) as cache:
        answer = longthink.generate(model, ids, past_key_values=cache, **GREEDY)
        new = torch.cat([answer[:, -1:], question], 1)
        mask = torch.ones(1, cache.columns + new.shape[1], dtype=torch.int64)
        # Without the answer's last token, which is not in the cache, its place would be taken by the next one.
        with pytest.raises(
            longthink.UnsupportedFeatureError, match="must cover the 25 in the cache and the 4 new"
        ):
            longthink.generate(model, question, mask, past_key_values=cache, **GREEDY)
        found = longthink.generate(
            model, new, mask, past_key_values=cache, prefill_chunk_size=chunk, **GREEDY
        )
    expected = model.generate(torch.cat([answer, question], 1), **GREEDY)
    assert torch.equal(found[:, new.shape[1] :], expected[:, -6:])


# Modes of torch and of the model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "first"),
    slow_but(
        by_day(covering(POLICIES, (True, False)), itertools.product(POLICIES, (True, False))),
        *(cell for cell in covering(POLICIES, (True, False)) if cell[0] in ("raas", "quest")),
    ),
)
def test_a_cache_goes_on_in_and_out_of_inference_mode(model, ids, policy, first):
    budget = {} if policy == "dense" else {"budget": 96}

    def turns(*modes):
        text = ids.clone()
        with longthink.make_cache(model, policy=policy, **budget) as cache:
            for seed, mode in enumerate(modes):
                with torch.inference_mode(mode):
                    text = model.generate(text, past_key_values=cache, max_new_tokens=25, do_sample=False)
                text = torch.cat([text.clone(), prompt((4,), seed=seed)[0]], 1)
        return text

    assert torch.equal(turns(first, not first, first), turns(False, False, False))


def test_rows_change_hands_across_inference_mode(model, ids):
    options = dict(max_new_tokens=30, num_beams=3, return_dict_in_generate=True)
    with torch.inference_mode():
        first = longthink.generate(model, ids, policy="raas", budget=96, **options)
    more = torch.cat([first.sequences.clone(), ids], 1)
    second = longthink.generate(model, more, past_key_values=copy_row(first.past_key_values), **GREEDY)
    assert second.shape[1] == more.shape[1] + 6


def copy_row(cache):
    cache.batch_select_indices(torch.tensor([0]))
    return cache


@pytest.mark.slow
def test_a_compiled_step_serves_both_modes(model, ids, light_compiler):
    options = dict(policy="recency", budget=48, do_sample=False, max_new_tokens=40)
    expected = longthink.generate(model, ids, compile=False, **options)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert torch.equal(longthink.generate(model, ids.clone(), compile=True, **options), expected)


def test_training_mode(model, ids, monkeypatch):
    expected = longthink.generate(model, ids, budget=64, **GREEDY)
    trained = build("qwen2").train()
    assert torch.equal(longthink.generate(trained, ids, budget=64, **GREEDY), expected)
    for layer in trained.model.layers:
        layer.gradient_checkpointing = True
    for call in (
        lambda: longthink.generate(trained, ids, budget=64, **GREEDY),
        lambda: trained.generate(ids, past_key_values=longthink.make_cache(trained, budget=64), **GREEDY),
    ):
        with pytest.raises(
            longthink.UnsupportedFeatureError, match=r"gradient checkpointing.*model\.eval\(\)"
        ):
            call()
    dropping = build("qwen2", attention_dropout=0.5).train()
    with pytest.raises(
        longthink.UnsupportedFeatureError, match=r"attention dropout \(0\.5\) in training mode"
    ):
        longthink.generate(dropping, ids, budget=64, **GREEDY)
    dropping.eval()
    assert torch.equal(longthink.generate(dropping, ids, budget=64, **GREEDY), expected)


def test_a_cache_that_shall_not_be_used_is_refused(model, ids, monkeypatch):
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    with longthink.make_cache(model, policy="raas", budget=64) as cache:
        of_model(model, monkeypatch, use_cache=False)
        with pytest.raises(longthink.UnsupportedFeatureError, match=r"use_cache=False.*pass use_cache=True"):
            model.generate(ids, past_key_values=cache, **GREEDY)
        hook.remove()
        assert not calls
        # Nothing was taken in, and the cache serves the next call.
        ours = model.generate(ids, past_key_values=cache, use_cache=True, **GREEDY)
    assert torch.equal(ours, model.generate(ids, **GREEDY))
    with longthink.Engine(model, policy="raas", budget=64) as engine:
        monkeypatch.setattr(model.config, "use_cache", False)
        assert list(engine.submit(ids, max_new_tokens=6)) == ours[0, 20:].tolist()


# Compilers ----------------------------------------------------------------------------------------------------


def test_compiled_model_is_told_apart(model, ids):
    with pytest.raises(longthink.UnsupportedModelError, match=r"model=OptimizedModule .*model\._orig_mod"):
        longthink.generate(torch.compile(model, backend="eager"), ids, budget=64)
    with pytest.raises(longthink.UnsupportedModelError, match=r"model\.module"):
        longthink.generate(torch.nn.DataParallel(model), ids, budget=64)


@pytest.mark.parametrize(
    ("kind", "learns_prompts", "instead"),
    [
        ("LORA", False, r"pass model\.get_base_model\(\)"),
        ("PROMPT_TUNING", True, r"past_key_values=make_cache\(model\.get_base_model\(\)"),
        ("PREFIX_TUNING", True, "vectors that belong to no token"),
    ],
)
def test_what_to_write_for_models_of_peft(ids, kind, learns_prompts, instead):
    config = SimpleNamespace(peft_type=kind, is_prompt_learning=learns_prompts)
    with pytest.raises(longthink.UnsupportedModelError, match=instead):
        longthink.generate(SimpleNamespace(active_peft_config=config), ids, budget=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", by_day(["model.compile", "wrapped"], ["model.compile", "model.forward", "wrapped"])
)
def test_a_compiled_model_writes_the_same_tokens(way, ids, light_compiler):
    model = build("qwen2", num_hidden_layers=1)
    options = dict(policy="raas", budget=48, max_new_tokens=40, do_sample=False)
    expected = longthink.generate(model, ids, **options)
    if way == "wrapped":
        with longthink.make_cache(model, policy="raas", budget=48) as cache:
            text, compiled = ids, torch.compile(model, backend="eager")
            new = ids
            for _ in range(40):
                with torch.no_grad():
                    new = compiled(new, past_key_values=cache).logits[:, -1:].argmax(-1)
                text = torch.cat([text, new], 1)
        assert torch.equal(text, expected)
        return
    if way == "model.compile":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(longthink.generate(model, ids, **options), expected)
    assert torch.equal(longthink.generate(model, ids, compile=True, **options), expected)
    with longthink.Engine(model, policy="raas", budget=48) as engine:
        assert list(engine.submit(ids, max_new_tokens=40)) == expected[0, 20:].tolist()


def goes_on_without_a_compiler():
    model, ids = build("qwen2", num_hidden_layers=1), prompt((20,))[0]
    end = model.generate(ids, max_new_tokens=9, do_sample=False)[0, 25].item()
    options = dict(do_sample=False, eos_token_id=end)
    expected = model.generate(ids, max_new_tokens=20, **options)
    for many in (9000, 20):
        ours = longthink.generate(model, ids, decode_budget=64, max_new_tokens=many, **options)
        assert ours.tolist() == expected.tolist()
    for call, given in ((longthink.generate, [ids]), (longthink.Engine, [])):
        with pytest.raises(longthink.UnsupportedFeatureError, match="compile=True cannot be used while"):
            call(model, *given, decode_budget=64, compile=True)


def test_without_a_compiler_auto_goes_on(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    goes_on_without_a_compiler()


@pytest.mark.slow
def test_torch_reads_its_other_switch_when_it_is_imported():
    script = "from tests.hf.test_calls import goes_on_without_a_compiler; goes_on_without_a_compiler()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TORCH_COMPILE_DISABLE": "1"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
