"""Memory is measured on what the process really holds, not computed."""

import gc
import itertools

import pytest
import torch
from transformers import StoppingCriteria

import longthink
from longthink.cache import LayerCache, Rotation
from longthink.config import Budget
from longthink.policies import grows
from tests.grids import covering, slow_but
from tests.models import build, prompt

BOUNDED = [p for p in longthink.available_policies() if not grows(longthink.make_policy(p))]
BUDGETS = ({"budget": 64}, {"decode_budget": 40})


def live_bytes(*, without: torch.Tensor) -> int:
    """Bytes of all tensor storages alive in this process, except the growing text itself."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        # A compiler's tensors without memory are of another type.
        real = type(thing) in (torch.Tensor, torch.nn.Parameter)
        if real and thing.device.type == "cpu" and thing is not without:
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


class Watch(StoppingCriteria):
    """Measures live tensor bytes at given numbers of generated tokens."""

    def __init__(self, start: int, at: tuple[int, ...]) -> None:
        self.bytes, self._steps = {}, {start + step: step for step in at}

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] in self._steps:
            self.bytes[self._steps[input_ids.shape[1]]] = live_bytes(without=input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def watched(policy: str, at: tuple[int, ...], **budget: int) -> dict[int, int]:
    ids, _ = prompt((20,))
    watch = Watch(20, at)
    longthink.generate(
        build("qwen2", num_hidden_layers=LAYERS),
        ids,
        policy=policy,
        max_new_tokens=at[-1],
        do_sample=False,
        stopping_criteria=[watch],
        **budget,
    )
    return watch.bytes


# What a text of N tokens costs beside the cache: ids, positions and masks that `generate` itself keeps.
TEXT_BYTES_PER_TOKEN = 8 * 8
LAYERS, EARLY, LATE = 1, 120, 270


@pytest.mark.slow
@pytest.mark.parametrize("policy", BOUNDED)
def test_live_bytes_of_the_process_stay_flat_while_it_decodes(policy):
    held = watched(policy, (EARLY, LATE), decode_budget=64)
    assert held[LATE] - held[EARLY] <= (LATE - EARLY) * TEXT_BYTES_PER_TOKEN


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dense", "quest"])
def test_the_measurement_sees_caches_that_grow(policy):
    budget = {} if policy == "dense" else {"budget": 64}
    held = watched(policy, (EARLY, LATE), **budget)
    per_token = 2 * LAYERS * 2 * 16 * 4  # K and V, layers, KV heads, head dim, float32
    assert held[LATE] - held[EARLY] > (LATE - EARLY) * per_token


def decode(layer: LayerCache, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        query, key = (torch.randn(1, heads, 1, 16, generator=generator) for heads in (4, 2))
        layer.attend(query, key, key)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["raas", "milestone", "h2o", "streaming_llm:positions=logical"])
def test_allocated_bytes_at_500_and_2000_steps_are_equal(policy):
    layer = LayerCache(longthink.make_policy(policy), Budget(decode_budget=256))
    prompt_keys = torch.randn(1, 2, 40, 16)
    layer.attend(torch.randn(1, 4, 40, 16), prompt_keys, prompt_keys)
    decode(layer, 500)
    early = layer.kv_bytes, layer.metadata_bytes, live_bytes(without=prompt_keys)
    decode(layer, 1_500)
    assert (layer.kv_bytes, layer.metadata_bytes, live_bytes(without=prompt_keys)) == early
    assert len(layer.resident_positions()[0][0]) <= 48 + 256


@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("rows", [1, 3])
def test_kv_bytes_equal_the_formula_and_metadata_is_small(policy, rows):
    made = longthink.make_policy(policy)
    layer = LayerCache(made, Budget(budget=512), rotation=Rotation(torch.ones(64)))
    keys = torch.randn(rows, 2, 40, 128)
    layer.attend(torch.randn(rows, 4, 40, 128), keys, keys)
    assert layer.kv_bytes == 2 * rows * 2 * 512 * 128 * 4
    # Positions cost 4 bytes a token; representatives 2 keys a page; stamps and masses 4 bytes each. SnapKV's votes
    # of 32 queries are an eighth of a key and value in float32.
    assert layer.metadata_bytes <= (0.14 if policy == "snapkv" else 0.09) * layer.kv_bytes


@pytest.mark.parametrize(
    ("policy", "rows", "budget"),
    slow_but(itertools.product(BOUNDED, (1, 2), BUDGETS), *covering(BOUNDED, (1, 2), BUDGETS)),
)
def test_a_cache_says_from_which_length_on_it_is_smaller_than_a_dense_one(model, policy, rows, budget):
    ids, _ = prompt((20,) * rows)
    with longthink.make_cache(model, policy=policy, **budget) as cache, torch.no_grad():
        assert cache.break_even_tokens is None
        model(ids, past_key_values=cache)
        length = cache.break_even_tokens
        assert 20 < length <= 80
        for seen in range(21, length + 2):
            model(ids[:, :1], past_key_values=cache)
            assert (cache.kv_bytes <= cache.dense_kv_bytes) == (seen >= length)
        assert f"break_even_tokens={cache.break_even_tokens}" in repr(cache)


def test_a_cache_that_evicts_nothing_has_no_such_length():
    model = build("qwen2")
    for policy in set(longthink.available_policies()) - set(BOUNDED):
        budget = {} if policy == "dense" else {"budget": 64}
        with longthink.make_cache(model, policy=policy, **budget) as cache, torch.no_grad():
            model(prompt((20,))[0], past_key_values=cache)
            assert cache.kv_bytes and cache.break_even_tokens is None
