"""Keys and values in a narrower format than the model's: half the bytes, nearly the same numbers."""

import pytest
import torch

import longthink
from longthink import kernels
from tests.grids import slow_but
from tests.models import build, prompt

TOLERANCE = {"bfloat16": 0.05, "float16": 0.005}


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_attention_over_narrow_keys_is_that_over_the_rounded_numbers(groups, with_weights):
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 3, groups, 16), torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    keys, values, resident = keys.bfloat16(), values.bfloat16(), torch.rand(2, 3, 40) < 0.6
    narrow = kernels.decode_attention(query, keys, values, resident, 0.25, with_weights=with_weights)
    wide = kernels.decode_attention(
        query, keys.float(), values.float(), resident, 0.25, with_weights=with_weights
    )
    torch.testing.assert_close(narrow[0], wide[0], rtol=1e-5, atol=1e-5)
    assert (narrow[1] is None) == (wide[1] is None) == (not with_weights)
    assert narrow[0].dtype == torch.float32


def teacher_forced(model, policy, kv_dtype):
    """Logits of a prompt with padding and of 40 given tokens; and the cache."""
    ids, mask = prompt((20, 33))
    forced = prompt((40, 40), seed=1)[0]
    budget = {} if policy == "dense" else {"budget": 256}
    with longthink.make_cache(model, policy=policy, kv_dtype=kv_dtype, **budget) as cache, torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model(ids, mask, position_ids=positions, past_key_values=cache)
        step = longthink.hf.DecodeStep(model, cache, compile=False)
        return torch.stack([step(token[:, None]) for token in forced.T]), cache


@pytest.mark.parametrize("policy", slow_but(longthink.available_policies(), "dense", "raas"))
def test_bytes_are_halved_and_logits_stay_close(policy):
    model = build("qwen2")
    exact, full = teacher_forced(model, policy, None)
    for kv_dtype, tolerance in TOLERANCE.items():
        logits, cache = teacher_forced(model, policy, kv_dtype)
        assert cache.kv_bytes * 2 == full.kv_bytes
        assert cache.summary()["kv_dtype"] == kv_dtype
        error = (logits - exact).square().mean().sqrt() / exact.std()
        assert 0 < error < tolerance
    same, _ = teacher_forced(model, policy, "float32")
    assert torch.equal(same, exact)


def test_a_second_turn_goes_on_in_the_same_format():
    model = build("qwen2")
    ids, _ = prompt((20,))
    options = {"max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True}
    out = longthink.generate(model, ids, policy="raas", budget=96, kv_dtype="bfloat16", **options)
    cache = out.past_key_values
    with pytest.raises(ValueError, match=r"past_key_values has kv_dtype='bfloat16', not 'float16'"):
        longthink.generate(model, out.sequences, past_key_values=cache, kv_dtype="float16", **options)
    longer = torch.cat([out.sequences, ids], 1)
    out = longthink.generate(model, longer, past_key_values=cache, **options)
    assert out.sequences.shape[1] == longer.shape[1] + 60


def test_bad_formats_are_refused():
    model = build("qwen2", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"kv_dtype='int8' is not one of 'bfloat16', 'float16', 'float32'"):
        longthink.make_cache(model, budget=64, kv_dtype="int8")
    caches = [longthink.make_cache(model, budget=64, kv_dtype=kv_dtype) for kv_dtype in (None, "float16")]
    with pytest.raises(longthink.CacheStateError, match="in the same format"):
        caches[0].adopt(0, caches[1])
