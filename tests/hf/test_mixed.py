"""Caches in which only some layers have full attention, beside windows and states; sinks, soft caps and latents."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

import longthink
from longthink.errors import CacheStateError, UnsupportedFeatureError, UnsupportedModelError
from longthink.hf import DecodeStep
from longthink.lab.evaluate.forced import ForcedDecode
from tests.families.compared import error, stepwise
from tests.families.tiny import tiny
from tests.models import prompt

WINDOWED, RECURRENT, WHOLE = ("gpt_oss", "gemma2", "llama4_text"), ("lfm2", "falcon_h1"), ("deepseek_v3",)
NO_SCALES = {"llama4_text": {"attn_temperature_tuning": False}}
KINDS = (*WINDOWED, *RECURRENT, *WHOLE)
GREEDY = dict(max_new_tokens=8, do_sample=False)
AMPLE = dict(policy="recency:page_size=4", decode_budget=64)
TIGHT = dict(policy="h2o:pin_prompt=True", decode_budget=8)
IDS, MASK = prompt((21, 13))


@pytest.fixture(scope="module")
def models():
    built = {}

    def model(kind, **more):
        known = kind, *map(str, more.items())
        if known not in built:
            built[known] = tiny(kind, **more)
        return built[known]

    return model


@pytest.fixture(params=KINDS)
def model(request, models):
    return models(request.param)


@pytest.fixture(params=RECURRENT)
def recurrent(request, models):
    return models(request.param)


@pytest.fixture(params=WINDOWED)
def windowed(request, models):
    return models(request.param)


WAYS = {
    "a left-padded batch": {},
    "beams": dict(num_beams=3),
    "several answers": dict(do_sample=True, num_return_sequences=2),
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_transformers(model, way):
    options = GREEDY | WAYS[way]
    torch.manual_seed(0)
    expected = model.generate(IDS, attention_mask=MASK, **options)
    torch.manual_seed(0)
    assert longthink.generate(model, IDS, MASK, **AMPLE, **options).tolist() == expected.tolist()


def test_a_prompt_in_chunks_is_read_as_one(model):
    expected = longthink.generate(model, IDS[:1], **TIGHT, **GREEDY)
    assert (
        longthink.generate(model, IDS[:1], prefill_chunk_size=8, **TIGHT, **GREEDY).tolist()
        == expected.tolist()
    )


@pytest.mark.parametrize("policy", ["recency:page_size=4", "h2o:pin_prompt=True"])
def test_a_later_turn_and_copies_go_on_as_transformers_does(model, policy):
    later = torch.cat([IDS[:1], torch.tensor([[5, 6, 7, 8, 9]])], 1)
    expected = model.generate(later, **GREEDY)
    with longthink.make_cache(model, **AMPLE | {"policy": policy}) as cache, torch.no_grad():
        model(IDS[:1], past_key_values=cache, logits_to_keep=1)
        for one in (copy.deepcopy(cache), cache):
            assert model.generate(later, past_key_values=one, **GREEDY).tolist() == expected.tolist()


def test_a_reset_cache_is_a_new_one(model):
    with longthink.make_cache(model, **TIGHT) as cache:
        texts = []
        for _ in range(2):
            texts.append(model.generate(IDS[:1], past_key_values=cache, **GREEDY).tolist())
            cache.reset()
            assert cache.kv_bytes == 0
    assert texts[0] == texts[1]


def test_rows_change_places_in_all_layers(model):
    text = torch.stack([IDS[0], IDS[0].flip(0)])
    order = torch.tensor([1, 0])
    with longthink.make_cache(model, **TIGHT) as cache, torch.no_grad():
        model(text, past_key_values=cache)
        other = copy.deepcopy(cache)
        other.batch_select_indices(order)
        expected = model(text[:, :1], past_key_values=cache).logits
        found = model(text[order][:, :1], past_key_values=other).logits
    assert torch.allclose(found[order], expected, atol=1e-5)


def test_forced_decoding_gives_the_logits_of_decoding(model):
    text = torch.cat([IDS[:1], IDS[1:, -12:]], 1)
    with longthink.make_cache(model, **TIGHT) as cache:
        expected, _ = stepwise(model, text, None, cache)
        assert cache.num_evicted > 0
    with longthink.make_cache(model, **TIGHT) as cache, torch.no_grad():
        model(text[:, :21], past_key_values=cache)
        forced = ForcedDecode(model, cache)
        found = torch.cat([forced(text[:, 21:28]), forced(text[:, 28:33])], 1)
    assert error(found, expected[:, 21:], None) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gpt_oss", {}),
        ("gemma2", {}),
        ("llama4_text", {"attn_temperature_tuning": False}),
        ("lfm2", {}),
        ("falcon_h1", {}),
    ],
)
def test_compiled_steps_give_the_logits_of_eager_ones(kind, more, models, light_compiler):
    model = models(kind, **more)
    expected = longthink.generate(model, IDS, MASK, compile=False, **TIGHT, **GREEDY)
    assert longthink.generate(model, IDS, MASK, compile=True, **TIGHT, **GREEDY).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("kind", "reason"), [("llama4_text", "scales its queries"), ("deepseek_v3", "other keys")]
)
def test_compiled_steps_that_would_go_wrong_are_refused(kind, reason, models):
    with pytest.raises(UnsupportedFeatureError, match=reason):
        longthink.generate(models(kind), IDS, MASK, compile=True, **TIGHT, **GREEDY)


@torch.no_grad()
def stepped(model, cache, steps=12):
    """Tokens of greedy decoding by `DecodeStep`."""
    step = DecodeStep(model, cache, compile=False)
    token = torch.full((cache.rows, 1), 7)
    tokens = []
    for _ in range(steps):
        token = step(token).argmax(-1, keepdim=True)
        tokens.append(token)
    return torch.cat(tokens, 1).tolist()


@torch.no_grad()
def plain(model, ids, mask, steps=12):
    """The same by transformers with its own cache."""
    cache, tokens = DynamicCache(config=model.config), []
    token = torch.full((len(ids), 1), 7)
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    for _ in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits = model(
            token, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache
        ).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
    return torch.cat(tokens, 1).tolist()


@pytest.mark.parametrize("columns", [(21, 13), (5, 2)], ids=["longer than the window", "shorter"])
def test_steps_do_not_read_padding_in_windows(windowed, columns):
    ids, mask = prompt(columns)
    with longthink.make_cache(windowed, **AMPLE) as cache, torch.no_grad():
        windowed(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache
        )
        assert stepped(windowed, cache) == plain(windowed, ids, mask)


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_gives_the_tokens_of_each_row_alone(models, kind):
    model = models(kind, **NO_SCALES.get(kind, {}))
    rows, lengths = (IDS[0], IDS[1, 8:], IDS[0, :9]), (8, 4, 8)  # the third takes the seat of the second
    expected = [
        longthink.generate(model, row[None], **TIGHT, **GREEDY)[0, len(row) :][:length].tolist()
        for row, length in zip(rows, lengths, strict=True)
    ]
    with longthink.Engine(model, seats=2, **TIGHT) as engine:
        handles = [
            engine.submit(row, max_new_tokens=length, keep_cache=True)
            for row, length in zip(rows, lengths, strict=True)
        ]
        results = [handle.result() for handle in handles]
        assert [list(result.tokens) for result in results] == expected
        more = engine.submit([5, 6], max_new_tokens=3, after=results[0]).result()
    whole = torch.tensor([[*IDS[0].tolist(), *expected[0], 5, 6]])
    with longthink.make_cache(model, **TIGHT) as cache:
        model.generate(IDS[:1], past_key_values=cache, **GREEDY)
        again = model.generate(whole, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert list(more.tokens) == again[0, -3:].tolist()


def test_an_engine_refuses_queries_that_are_scaled_by_columns(models):
    with pytest.raises(UnsupportedModelError, match=r"longthink\.generate with a batch"):
        longthink.Engine(models("llama4_text"), seats=2, **TIGHT)


def hidden_end(model, cache):
    """A second turn whose mask hides what the second row read last."""
    first = model.generate(IDS, attention_mask=MASK, past_key_values=cache, **GREEDY)
    mask = torch.cat([MASK, torch.ones(2, 10)], 1).long()
    mask[1, 26:29] = 0
    text = torch.cat([first, torch.tensor([[5, 6]] * 2)], 1)
    return model.generate(text, attention_mask=mask, past_key_values=cache, **GREEDY)


def test_a_state_cannot_forget_what_it_has_read(recurrent):
    with longthink.make_cache(recurrent, **AMPLE) as cache:
        with pytest.raises(UnsupportedFeatureError, match="a state cannot be taken back"):
            hidden_end(recurrent, cache)
        with pytest.raises(CacheStateError, match="interrupted"):
            recurrent(IDS, past_key_values=cache)


def test_a_window_hides_what_a_later_mask_hides(windowed):
    with longthink.make_cache(windowed, **AMPLE) as cache:
        found = hidden_end(windowed, cache)
    assert found.tolist() == hidden_end(windowed, DynamicCache(config=windowed.config)).tolist()


def test_bytes_are_told_by_kind_of_layer(models):
    for kind, parts in (("gpt_oss", {"windowed"}), ("falcon_h1", {"recurrent"}), ("deepseek_v3", set())):
        with longthink.make_cache(models(kind), **TIGHT) as cache:
            models(kind).generate(IDS[[0, 0]], past_key_values=cache, **GREEDY)
            held = cache.kv_bytes_parts
            assert {name for name, size in held.items() if size} == parts | {"bounded"}
            assert cache.kv_bytes == sum(held.values())
            assert cache.dense_kv_bytes == sum(map(cache.row_dense_kv_bytes, range(2)))
    # The library keeps 16 + 8 numbers of a token in a latent layer; keys and values are 4 heads of 24 and 12.
    assert cache.dense_kv_bytes == 4 * 2 * 28 * (16 + 8) * 4
    assert held["bounded"] == 4 * 2 * 29 * 4 * (24 + 12) * 4


def test_what_a_window_holds_does_not_grow(windowed):
    sizes = []
    with longthink.make_cache(windowed, **TIGHT) as cache:
        for tokens in (12, 40):
            cache.reset()
            windowed.generate(IDS[:1], past_key_values=cache, max_new_tokens=tokens, do_sample=False)
            sizes.append(cache.kv_bytes_parts["windowed"])
    # Keys and values of 2 heads with 8 numbers, in slots for the window and no more.
    assert sizes[0] == sizes[1] == len(cache.windows) * 2 * 2 * 8 * 8 * 4


def test_what_is_not_served_says_so(models, tmp_path):
    for kind in KINDS:
        with longthink.make_cache(models(kind), **TIGHT) as cache, torch.no_grad():
            models(kind)(IDS, past_key_values=cache)
            with pytest.raises(UnsupportedFeatureError, match="cropped"):
                cache.crop(-2)
            with pytest.raises(CacheStateError, match="holds 2 rows and was given 1"):
                models(kind)(IDS[:1], past_key_values=cache)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_pass_is_noticed(model, at, monkeypatch):
    """Wherever that was: before the first layer with pages, between them, or behind the last one."""
    if not hasattr(Cache, "get_conv_state") and hasattr(model.config, "conv_bias"):
        pytest.skip("this version of transformers changes a convolution's state where no cache sees it")
    with longthink.make_cache(model, **TIGHT) as cache, torch.no_grad():
        model(IDS, past_key_values=cache)
        for name in ("update", "update_conv_state", "update_recurrent_state", "get_conv_state"):
            own = getattr(type(cache), name)

            def update(self, *args, own=own, **kwargs):
                if any(isinstance(arg, int) and arg == at for arg in args):
                    raise KeyboardInterrupt
                return own(self, *args, **kwargs)

            monkeypatch.setattr(type(cache), name, update)
        with pytest.raises(KeyboardInterrupt):
            model(IDS[:, :1], past_key_values=cache)
        monkeypatch.undo()
        with pytest.raises(CacheStateError, match="interrupted"):
            model(IDS[:, :1], past_key_values=cache)


@pytest.mark.slow
def test_compiled_seats_hold_windows_of_different_lengths(models, light_compiler):
    model, rows = models("gpt_oss"), (IDS[0], IDS[1, 8:], IDS[0, :9])
    with torch._dynamo.config.patch(error_on_recompile=True):
        with longthink.Engine(model, seats=2, compile=True, **TIGHT) as engine:
            handles = [engine.submit(row, max_new_tokens=14 - i) for i, row in enumerate(rows)]
            found = [list(handle.result().tokens) for handle in handles]
    for i, row in enumerate(rows):
        expected = longthink.generate(model, row[None], **TIGHT, max_new_tokens=14 - i, do_sample=False)
        assert found[i] == expected[0, len(row) :].tolist()
