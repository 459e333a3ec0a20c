"""Advice from numbers that are easy to check."""

import pytest
import torch

from longthink.config import Budget
from longthink.hf import make_cache
from longthink.lab.fidelity.advice import Shape, advise, request_bytes, shape_of
from longthink.lab.fidelity.summary import Summary
from longthink.lab.results.statistics import Interval
from longthink.models import load_empty, load_model
from longthink.policies import make_policy
from tests.models import build

SHAPE = Shape(layers=2, kv_heads=2, head_dim=8, dtype=torch.bfloat16, weights=1000, prompt=20, tokens=120)
PER_TOKEN = 2 * 2 * 2 * 8 * 2


def row(policy, budget, kl, *, source="texts"):
    near = None if kl is None else Interval(mean=kl, low=kl, high=kl)
    return Summary(
        source=source, policy=policy, budget=None, decode_budget=budget, texts=2, unscored=0, tokens=100,
        long_tokens=0, loss=near, kl=near, differs=near, long_loss=None, long_kl=None, long_differs=None,
        evicted=0.5, kv_bytes=1.0, dense_kv_bytes=2.0, versus={},
    )  # fmt: skip


def test_the_least_memory_near_enough_comes_first():
    rows = [
        row("recency", 64, 0.01), row("recency", 32, 0.05), row("recency", 16, 0.06), row("raas", 20, 0.01),
        row("fifo", 32, 0.005), row("quest", 16, 0.0), row("random", 16, None),
        row("tova", 16, 0.01), row("tova", 16, 0.2, source="others"),
    ]  # fmt: skip
    found = advise(rows, SHAPE, kl=0.05, memory=1000 + PER_TOKEN * 280)
    # raas: the prompt takes 2 pages of 16 and 20 tokens take 2, so 64; recency: 20 + 32.
    assert [(one.row.policy, one.row.decode_budget) for one in found] == [
        ("recency", 32), ("fifo", 32), ("raas", 20), ("recency", 64)
    ]  # fmt: skip
    assert [one.kv_bytes // PER_TOKEN for one in found] == [52, 64, 64, 84]
    # Beside keys and values there are positions and a few numbers for each row: 5 times 52 tokens do not fit in 280.
    assert [one.requests for one in found] == [4, 3, 3, 2] and found[0].dense_requests == 2
    assert found[0].dense_kv_bytes == 120 * PER_TOKEN


@pytest.mark.parametrize(
    "spec", ["recency", "raas:page_size=4", "milestone:page_size=4", "h2o", "raas:page_size=4:dense_layers=1"]
)
def test_memory_is_what_a_real_cache_allocates(spec):
    model = build("qwen2")
    head_dim = model.model.layers[0].self_attn.head_dim
    shape = Shape(
        layers=2, kv_heads=2, head_dim=head_dim, dtype=torch.float32, weights=0, prompt=12, tokens=64
    )
    with make_cache(model, policy=spec, decode_budget=16) as cache, torch.no_grad():
        ids = torch.arange(3, 67)[None]
        model(ids[:, :12], past_key_values=cache)
        for now in range(12, 64):
            model(ids[:, now : now + 1], past_key_values=cache)
        real = (cache.kv_bytes, cache.metadata_bytes)
    found = request_bytes(make_policy(spec), Budget(decode_budget=16), shape)
    if "dense" in spec:  # a growing layer keeps spare room
        assert found[0] <= real[0] <= 1.5 * found[0]
    else:
        assert found == real


def test_memory_of_a_published_shape():
    """Qwen2.5-7B: 28 layers, 4 KV heads of 128, bfloat16: 56 KiB for each token."""
    shape = Shape(layers=28, kv_heads=4, head_dim=128, dtype=torch.bfloat16, weights=15 * 2**30, prompt=500,
                  tokens=8500)  # fmt: skip
    (one,) = advise([row("recency", 1012, 0.01)], shape, kl=0.05, memory=24 * 2**30)
    assert one.kv_bytes == 1512 * 56 * 1024
    assert one.dense_kv_bytes == 8500 * 56 * 1024
    assert 0 < one.metadata_bytes < 0.02 * one.kv_bytes
    assert one.dense_requests == 9 * 2**30 // (8500 * 56 * 1024) == 19
    assert one.requests == 9 * 2**30 // one.bytes == 110


def test_memory_never_exceeds_dense_and_no_room_is_none():
    (one,) = advise([row("recency", 500, 0.0)], SHAPE, kl=0.05, memory=10)
    assert one.kv_bytes == one.dense_kv_bytes and (one.requests, one.dense_requests) == (0, 0)
    assert advise([row("recency", 64, 0.5)], SHAPE, kl=0.05, memory=10) == []


def test_the_shape_of_a_model_needs_no_weights(tmp_path):
    model = build("qwen2", num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for dtype, size in (("auto", 4), ("bfloat16", 2)):
        shape = shape_of(load_empty(str(tmp_path), dtype=dtype), [(10, 90), (15, 20)])
        assert (shape.layers, shape.kv_heads, shape.tokens, shape.prompt) == (3, 2, 100, 12)
        assert shape.weights == size * sum(weight.numel() for weight in model.parameters())
        assert shape.dtype.itemsize == size
    assert shape_of(load_empty(), [(1, 1)]).weights == sum(w.nbytes for w in load_model().model.parameters())


@pytest.mark.parametrize("name, value", [("kl", -0.1), ("memory", -1)])
def test_bad_input_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        advise([], SHAPE, **{"memory": 10, "kl": 0.1} | {name: value})
