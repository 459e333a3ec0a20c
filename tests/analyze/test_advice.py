"""Advice from numbers that are easy to check."""

import pytest
import torch

from longthink.config import Budget
from longthink.hf import make_cache
from longthink.lab.analyze.advice import Shape, advise, request_bytes
from longthink.lab.analyze.replays import Mean, Replay, means
from longthink.policies import make_policy
from tests.models import build

SHAPE = Shape(layers=2, kv_heads=2, head_dim=8, dtype=torch.bfloat16, weights=1000, prompt=20, tokens=120)
PER_TOKEN = 2 * 2 * 2 * 8 * 2


def row(policy, budget, lookups, *, recall=0.9, no_room=0):
    known = {"policy": policy, "budget": None, "decode_budget": budget, "page_size": 1}
    return Mean(**known, problems=2, no_room=no_room, recall=recall, worst=0.5, lookups=lookups, evictions=1.0,
                regrets=1.0)  # fmt: skip


def test_the_least_memory_within_the_loss_comes_first():
    rows = [
        row("recency", 64, 0.99), row("recency", 32, 0.98), row("recency", 16, 0.97), row("raas", 20, 0.99),
        row("fifo", 32, 0.995), row("quest", 16, 1.0), row("belady", 8, 1.0), row("optimum", 8, None),
        row("random", 16, 1.0, no_room=1),
    ]  # fmt: skip
    found = advise(rows, SHAPE, loss=0.02, memory=1000 + PER_TOKEN * 280)
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
    (one,) = advise([row("recency", 1012, 0.99)], shape, memory=24 * 2**30)
    assert one.kv_bytes == 1512 * 56 * 1024
    assert one.dense_kv_bytes == 8500 * 56 * 1024
    assert 0 < one.metadata_bytes < 0.02 * one.kv_bytes
    assert one.dense_requests == 9 * 2**30 // (8500 * 56 * 1024) == 19
    assert one.requests == 9 * 2**30 // one.bytes == 110


def test_memory_never_exceeds_dense_and_no_room_is_none():
    (one,) = advise([row("recency", 500, 1.0)], SHAPE, memory=10)
    assert one.kv_bytes == one.dense_kv_bytes and (one.requests, one.dense_requests) == (0, 0)
    assert advise([row("recency", 64, 0.5)], SHAPE, memory=10) == []
    assert advise([row("recency", 64, 0.5, recall=0.99)], SHAPE, memory=10, measure="recall") != []


@pytest.mark.parametrize("name, value", [("loss", 1.5), ("measure", "luck"), ("memory", -1)])
def test_bad_input_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        advise([], SHAPE, **{"memory": 10} | {name: value})


def test_means_leave_out_what_had_no_room():
    def outcome(problem, recall, note=""):
        return Replay(task="t", problem=problem, policy="recency", budget=64, decode_budget=None, recall=recall,
                       worst=recall / 2, lookups=1.0, evictions=4, regrets=2, note=note)  # fmt: skip

    (found,) = means([outcome("a", 0.8), outcome("b", 0.6), outcome("c", float("nan"), "no room")])
    assert (found.problems, found.no_room) == (2, 1)
    assert found.recall == pytest.approx(0.7) and found.worst == pytest.approx(0.35)
    (none,) = means([outcome("c", float("nan"), "no room")])
    assert (none.problems, none.recall, none.regrets) == (0, None, None)
