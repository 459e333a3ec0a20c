"""Caches at few bits behind the public functions: tokens, bytes, rows, turns, files, and what is refused."""

import copy
import itertools

import pytest
import torch

import longthink
from longthink.errors import BudgetError, CacheFileError, UnsupportedFeatureError
from longthink.hf import Request
from longthink.hf.cachefile import read_cache_file, write_cache_file
from tests.grids import by_day, covering, slow_but
from tests.models import build, prompt

POLICIES = ("recall", "raas", "recency", "milestone", "random", "quest", "dense")
BOUNDED = ("recall", "raas", "recency")
BITS = (4, "3", "4/2", "2:page=16:window=32", "3:prompt=packed")
FIXED = dict(max_new_tokens=180, min_new_tokens=180, do_sample=False)


@pytest.fixture(scope="module")
def model():
    return build("qwen2")


def budget_of(policy):
    return {} if policy == "dense" else {"decode_budget": 96}


def decode(model, cache, ids, **more):
    with cache:
        return model.generate(ids, past_key_values=cache, **FIXED | more)


@pytest.mark.parametrize("policy", slow_but(POLICIES, "recall", "dense"))
def test_eight_bits_decode_what_full_keys_do_while_nothing_is_evicted(model, policy):
    ids = prompt((40,))[0]
    expected = model.generate(ids, **FIXED)
    more = {} if policy == "dense" else {"decode_budget": 320}
    with longthink.make_cache(model, policy=policy, kv_bits=8, **more) as cache:
        tokens = model.generate(ids, past_key_values=cache, **FIXED)
        assert (tokens == expected).float().mean() > 0.9
        assert cache.num_evicted == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "kv_bits"),
    by_day(covering(BOUNDED, BITS), itertools.product(BOUNDED, BITS)),
)
def test_bytes_stay_and_are_those_of_the_budget(model, policy, kv_bits):
    ids = prompt((40,))[0]
    cache = longthink.make_cache(model, policy=policy, kv_bits=kv_bits, decode_budget=96)
    held = []

    class Watch(torch.nn.Module):
        def __call__(self, ids, scores):
            held.append(cache.kv_bytes)
            return scores

    decode(model, cache, ids, max_new_tokens=900, min_new_tokens=900, logits_processor=[Watch()])
    # Two layers, two KV heads, 16 channels, 4 bytes, keys and values.
    per_token = 2 * 2 * 16 * 4 * 2
    page = longthink.make_cache(model, policy=policy, kv_bits=kv_bits, budget=256).kv_bits.page
    in_full = sum(-(-tokens // page) * page for tokens in (40, 96)) * per_token
    assert set(held) == {held[-1]}
    assert in_full - page * per_token <= held[-1] <= in_full
    assert cache.bound_tokens * per_token > in_full
    assert cache.num_evicted > 0
    resident = cache.resident_positions(0)[0][0]
    assert resident[-1] == cache.columns - 1
    if "packed" not in str(kv_bits):
        assert resident[:40] == list(range(40))


@pytest.mark.slow
def test_dense_at_four_bits_holds_everything_in_fewer_bytes(model):
    ids = prompt((8,))[0]
    cache = longthink.make_cache(model, policy="dense", kv_bits=4)
    decode(model, cache, ids, max_new_tokens=1500, min_new_tokens=1500)
    assert cache.num_evicted == 0
    assert cache.resident_positions(1)[0][1] == list(range(cache.columns))
    assert cache.kv_bytes < cache.dense_kv_bytes / 3


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_padded_rows_decode_as_they_do_alone(model, policy):
    ids, mask = prompt((40, 23))
    cache = longthink.make_cache(model, policy=policy, kv_bits=4, **budget_of(policy))
    together = decode(model, cache, ids, attention_mask=mask)
    for row in range(2):
        own = ids[row][mask[row].bool()][None]
        alone = longthink.make_cache(model, policy=policy, kv_bits=4, **budget_of(policy))
        tokens = decode(model, alone, own)
        assert together[row, ids.shape[1] :].tolist() == tokens[0, own.shape[1] :].tolist()
        assert cache.resident_positions(1)[row] == alone.resident_positions(1)[0]


@pytest.mark.parametrize("policy", slow_but(POLICIES, "raas"))
def test_a_saved_cache_goes_on_as_the_original(model, policy, tmp_path):
    ids = prompt((40,))[0]
    cache = longthink.make_cache(model, policy=policy, kv_bits="3/4:window=32", **budget_of(policy))
    tokens = decode(model, cache, ids)
    cache.save(tmp_path / "cache")
    twin = copy.deepcopy(cache)
    loaded = longthink.load_cache(model, tmp_path / "cache")
    assert str(loaded.kv_bits) == "3/4:window=32"
    assert loaded.kv_bytes == cache.kv_bytes
    more = torch.cat([tokens, tokens[:, :5]], 1)
    outs = [decode(model, one, more, max_new_tokens=60, min_new_tokens=60) for one in (cache, twin, loaded)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_file_whose_order_of_channels_is_none_is_refused(model, tmp_path):
    cache = longthink.make_cache(model, kv_bits=3, decode_budget=96)
    decode(model, cache, prompt((40,))[0], max_new_tokens=1, min_new_tokens=1)
    cache.save(tmp_path / "cache")
    contents, tensors = read_cache_file(tmp_path / "cache")
    tensors["layers.1.channel_order_BN"][0, 17] = tensors["layers.1.channel_order_BN"][0, 18]
    write_cache_file(tmp_path / "cache", contents, tensors)
    with pytest.raises(CacheFileError, match="layer 1: channel_order_BN: not an order of channels"):
        longthink.load_cache(model, tmp_path / "cache")


@pytest.mark.parametrize("policy", slow_but(POLICIES, "milestone"))
def test_a_later_turn_is_what_one_token_at_a_time_would_be(model, policy):
    ids, turn = prompt((40,))[0], prompt((37,), seed=5)[0]
    cache = longthink.make_cache(model, policy=policy, kv_bits=4, **budget_of(policy))
    text = torch.cat([decode(model, cache, ids), turn], 1)
    before = cache.columns
    tokens = decode(model, cache, text)
    assert tokens.shape[1] == text.shape[1] + 180
    resident = cache.resident_positions(0)[0][0]
    # What the user writes stays, and is in full.
    assert set(range(40)) <= set(resident)
    assert set(range(before, before + 38)) <= set(resident)
    if policy == "dense":
        assert resident == list(range(cache.columns))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["recall", "raas", "dense"])
def test_rows_that_ended_early_are_rewound(model, policy):
    """Padding that was decoded is dropped in the next turn, and a page that was packed meanwhile is written on."""
    ids, mask = prompt((40, 40))
    own = longthink.make_cache(model, policy=policy, kv_bits=8, **budget_of(policy))
    text = decode(model, own, ids, attention_mask=mask)
    length = text.shape[1]
    # The second row ended 75 tokens before the first one.
    mask = torch.ones_like(text)
    mask[1, length - 75 :] = 0
    turn = prompt((6, 6), seed=3)[0]
    out = decode(
        model, own, torch.cat([text, turn], 1),
        attention_mask=torch.cat([mask, torch.ones_like(turn)], 1), max_new_tokens=100, min_new_tokens=100,
    )  # fmt: skip
    assert out.shape[1] == length + 106
    resident = own.resident_positions(0)
    assert resident[1][0][-1] == own.columns - 1 - 75
    alone = longthink.make_cache(model, policy=policy, kv_bits=8, **budget_of(policy))
    decode(model, alone, ids[1:], max_new_tokens=length - 40 - 75 + 1, min_new_tokens=length - 40 - 75 + 1)
    if policy == "dense":
        assert resident[1][0] == list(range(own.columns - 75))


@pytest.mark.slow
def test_beams_and_several_answers(model):
    ids = prompt((40,))[0]
    for more in (dict(num_beams=3), dict(do_sample=True, num_return_sequences=3)):
        out = longthink.generate(model, ids, kv_bits=4, decode_budget=96, **FIXED | more)
        assert out.shape[1] == 220


@pytest.mark.slow
@pytest.mark.parametrize("prompt_kept", ["full", "packed"])
def test_a_prompt_in_chunks_is_the_same(model, prompt_kept):
    ids = prompt((150,))[0]
    bits = f"2:prompt={prompt_kept}"
    more = dict(kv_bits=bits, decode_budget=96) | FIXED
    whole = longthink.generate(model, ids, **more)
    assert torch.equal(longthink.generate(model, ids, prefill_chunk_size=37, **more), whole)


@pytest.mark.slow
def test_the_engine_decodes_what_generate_does(model):
    texts = [prompt((n,), seed=n)[0] for n in (40, 9, 70)]
    with longthink.Engine(model, kv_bits=4, decode_budget=96, seats=2) as engine:
        requests = [
            Request(key=str(i), tokens=tuple(ids[0].tolist()), max_new_tokens=150)
            for i, ids in enumerate(texts)
        ]
        found = {done.request.tokens: done.tokens for done in engine.map(requests)}
    for ids in texts:
        alone = longthink.generate(
            model, ids, kv_bits=4, decode_budget=96, max_new_tokens=150, do_sample=False
        )
        tokens = found[tuple(ids[0].tolist())]
        assert list(tokens) == alone[0, ids.shape[1] :].tolist()[: len(tokens)]


@pytest.mark.parametrize(
    "policy", ["h2o", "streaming_llm", "tova", "snapkv", "r_kv", "keydiff", "lazy_eviction"]
)
def test_policies_of_single_tokens_are_refused(model, policy):
    with pytest.raises(UnsupportedFeatureError, match=f"{policy}.*single tokens.*kv_bits=4"):
        longthink.make_cache(model, policy=policy, kv_bits=4, budget=256)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (5, "kv_bits: keys=5 is not one of 8, 4, 3, 2"),
        ("4/16", "kv_bits: values=16"),
        ("four", "kv_bits='four' cannot be read: give 8, 4, 3 or 2"),
        ("4/2/1", "cannot be read"),
        ("4:windows=32", "cannot be read"),
        ("4:window=40", "window=40 must be a multiple of page=32"),
        ("4:page=64", "page=64 is not one of 16, 32"),
        ("4:prompt=lost", "prompt='lost' is not one of"),
        (4.0, "kv_bits=4.0 is not a number of bits"),
        (True, "kv_bits=True is not a number of bits"),
    ],
)
def test_what_is_no_number_of_bits_is_refused(model, value, fault):
    with pytest.raises(ValueError, match=fault):
        longthink.make_cache(model, kv_bits=value, budget=256)


def test_a_budget_without_room_for_a_packed_page_is_refused(model):
    ids = prompt((40,))[0]
    with pytest.raises(BudgetError, match=r"window of 64\. Give decode_budget >= 96, or a smaller window"):
        longthink.generate(model, ids, kv_bits=8, decode_budget=64, max_new_tokens=9)
    longthink.generate(model, ids, kv_bits=8, decode_budget=96, max_new_tokens=9)
    with pytest.raises(BudgetError, match=r"Give budget >= 160, or a smaller window"):
        longthink.generate(model, ids, kv_bits=8, budget=128, max_new_tokens=9)


def test_a_cache_that_goes_on_keeps_its_bits(model):
    ids = prompt((20,))[0]
    options = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    out = longthink.generate(model, ids, kv_bits="4/2", decode_budget=96, **options)
    cache = out.past_key_values
    assert cache.summary()["kv_bits"] == "4/2"
    with pytest.raises(ValueError, match=r"past_key_values has kv_bits='4/2', not '3'"):
        longthink.generate(model, out.sequences, past_key_values=cache, kv_bits=3, **options)
    longthink.generate(model, out.sequences, past_key_values=cache, kv_bits="4/2", policy="recall", **options)
