"""A prompt that is read piece by piece gives what it gives in one go, in less memory."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import longthink
from longthink.cache import LayerCache
from longthink.config import Budget
from longthink.hf.generation import CHUNKS_LATER_TURNS
from longthink.policies import needs_budget
from tests.grids import slow_but
from tests.hf.test_conformance import VARIANTS
from tests.models import build, prompt

POLICIES = longthink.available_policies()


def budget_of(policy, **given):
    return given if needs_budget(longthink.make_policy(policy)) else {}


def read(model, ids, mask, policy, budget, **options):
    """Tokens, and which positions each layer holds at the end."""
    out = longthink.generate(
        model, ids, mask, policy=policy, **budget, max_new_tokens=40, do_sample=False,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    cache = out.past_key_values
    return out.sequences, [cache.resident_positions(layer) for layer in range(len(cache.layers))]


def assert_pieces_change_nothing(policy, lengths, *sizes, **given):
    model, (ids, mask) = build("qwen2"), prompt(lengths)
    budget = budget_of(policy, **given)
    whole, kept = read(model, ids, mask, policy, budget)
    for size in sizes:
        pieces, kept_of_pieces = read(model, ids, mask, policy, budget, prefill_chunk_size=size)
        assert torch.equal(pieces, whole)
        assert kept_of_pieces == kept


@pytest.mark.parametrize("policy", slow_but(POLICIES, "h2o", "milestone", "quest"))
def test_pieces_change_nothing(policy):
    """Left-padded rows, of which one has no token in the first piece and the last piece is a single column."""
    assert_pieces_change_nothing(policy, (49, 30, 12), 16, decode_budget=24)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [*POLICIES, *VARIANTS])
def test_any_size_changes_nothing(policy):
    assert_pieces_change_nothing(policy, (49, 1), 1, 49, decode_budget=24)


@pytest.mark.parametrize("policy", slow_but(["streaming_llm", "h2o", "raas:pin_prompt=false"], "h2o"))
def test_a_prompt_longer_than_the_budget_is_trimmed_as_a_whole(policy):
    assert_pieces_change_nothing(policy, (90, 40), 16, budget=32)


def test_sampling_beams_and_the_generation_config_as_well():
    model, (ids, mask) = build("qwen2"), prompt((33, 20))
    for options in (dict(num_beams=3, do_sample=False), dict(do_sample=True, num_return_sequences=2)):
        texts = []
        for size in (None, 8):
            torch.manual_seed(0)
            model.generation_config.prefill_chunk_size = size
            texts.append(longthink.generate(model, ids, mask, decode_budget=32, max_new_tokens=30, **options))
        assert torch.equal(*texts)


@pytest.mark.skipif(
    not CHUNKS_LATER_TURNS, reason="transformers before 5.21 splits a later turn's text wrongly"
)
@pytest.mark.parametrize("policy", slow_but(POLICIES, "raas", "streaming_llm"))
def test_a_second_turn_may_come_in_pieces(policy):
    model, (ids, mask) = build("qwen2"), prompt((20, 20))
    more, _ = prompt((17, 17), seed=1)
    texts = []
    for size in (None, 8):
        with longthink.make_cache(model, policy=policy, **budget_of(policy, decode_budget=32)) as cache:
            options = dict(policy=policy, past_key_values=cache, do_sample=False, prefill_chunk_size=size)
            first = longthink.generate(model, ids, mask, max_new_tokens=20, **options)
            turn = torch.cat([first, more], 1)
            texts.append(longthink.generate(model, turn, torch.ones_like(turn), max_new_tokens=20, **options))
    assert torch.equal(*texts)


def test_a_version_that_splits_a_later_turn_wrongly_is_told_of_it(monkeypatch):
    monkeypatch.setattr("longthink.hf.generation.CHUNKS_LATER_TURNS", False)
    model, (ids, _) = build("qwen2"), prompt((20,))
    with longthink.make_cache(model, decode_budget=32) as cache:
        options = dict(past_key_values=cache, do_sample=False, max_new_tokens=4)
        first = longthink.generate(model, ids, prefill_chunk_size=8, **options)
        held = cache.columns
        turn = torch.cat([first, ids], 1)
        with pytest.raises(
            longthink.UnsupportedFeatureError, match=r"in a later turn needs transformers >= 5\.21"
        ):
            longthink.generate(model, turn, prefill_chunk_size=8, **options)
        assert cache.columns == held
        longthink.generate(model, turn, **options)


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor):
                # A view makes nothing, however large it looks.
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return out


def largest(policy, tokens, size):
    model = build("qwen2", intermediate_size=1024, num_key_value_heads=1)
    weights = max(parameter.nbytes for parameter in model.parameters())
    with Largest() as mode:
        longthink.generate(
            model, prompt((tokens,))[0], policy=policy, **budget_of(policy, decode_budget=16), max_new_tokens=2,
            do_sample=False, prefill_chunk_size=size,
        )  # fmt: skip
    assert mode.bytes > weights
    return mode.bytes


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dense", "milestone", "streaming_llm", "h2o"])
def test_memory_beside_the_cache_follows_the_piece(policy):
    """Largest tensor: the MLP's activations of the prompt, or those of a piece and a row of keys for each token."""
    wide, heads = 1024 * 4, 4
    assert largest(policy, 1024, None) >= 1024 * wide
    pieces = largest(policy, 1024, 64)
    assert pieces <= max(64 * wide, 64 * 1024 * 4 * heads if policy == "h2o" else 0, 1024 * 16 * 8 * 2)
    assert largest(policy, 2048, 64) <= 2 * pieces


def test_pieces_are_counted_while_they_wait_and_freed_with_the_last_one():
    layer = LayerCache(longthink.make_policy("streaming_llm:positions=logical"), Budget(budget=8))
    layer.begin_chunked_prefill(50)
    for _ in range(5):
        assert layer.in_chunked_prefill
        keys = torch.randn(1, 2, 10, 4)
        layer.attend(torch.randn(1, 4, 10, 4), keys, keys)
        assert layer.kv_bytes == 2 * 2 * (50 if layer.in_chunked_prefill else 8) * 4 * 4
    assert not layer.in_chunked_prefill
    assert layer.resident_positions()[0][0] == [0, 1, 2, 3, 46, 47, 48, 49]


def test_what_does_not_fit_is_refused_as_soon_as_it_is_known_and_the_cache_is_as_new():
    model, (ids, _) = build("qwen2"), prompt((90,))
    columns = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: columns.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with longthink.make_cache(model, policy="raas", budget=48) as cache:
        with pytest.raises(longthink.BudgetError, match="prompt of 40 tokens"):
            longthink.generate(
                model, ids, policy="raas", past_key_values=cache, prefill_chunk_size=20, max_new_tokens=4
            )
        assert columns == [20, 20]
        hook.remove()
        assert (cache.kv_bytes, cache.get_seq_length()) == (0, 0)
        again = longthink.generate(model, ids[:, :20], policy="raas", past_key_values=cache, max_new_tokens=4)
    fresh = longthink.generate(model, ids[:, :20], policy="raas", budget=48, max_new_tokens=4)
    assert torch.equal(again, fresh)


def test_an_interrupted_prompt_leaves_nothing_behind():
    model, (ids, _) = build("qwen2"), prompt((60,))
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    with longthink.make_cache(model, decode_budget=48) as cache:
        with pytest.raises(KeyboardInterrupt):
            longthink.generate(model, ids, past_key_values=cache, prefill_chunk_size=16, max_new_tokens=4)
        hook.remove()
        assert cache.kv_bytes == 0
        tokens = longthink.generate(model, ids, past_key_values=cache, max_new_tokens=4)
    gc.collect()
    assert torch.equal(tokens, longthink.generate(model, ids, decode_budget=48, max_new_tokens=4))
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_right_is_refused():
    model, (ids, _) = build("qwen2"), prompt((20,))
    for size in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"prefill_chunk_size={size}"):
            longthink.generate(model, ids, decode_budget=32, prefill_chunk_size=size, max_new_tokens=4)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(
        longthink.UnsupportedFeatureError, match="prefill_chunk_size=8 needs the prompt as input_ids"
    ):
        longthink.generate(
            model, None, inputs_embeds=embeds, decode_budget=32, prefill_chunk_size=8, max_new_tokens=4
        )
    with (
        longthink.make_cache(model, decode_budget=32) as cache,
        torch.no_grad(),
        cache.begin_chunked_prefill(10),
        pytest.raises(longthink.CacheStateError, match="10 columns was announced, and 20 came"),
    ):
        model(ids, past_key_values=cache)
