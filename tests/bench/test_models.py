"""The model of a benchmark: random of a given shape, or loaded by name."""

import pytest
import torch

from longthink.lab.bench.models import RANDOM, bench_model, random_shape


def test_a_random_model_has_the_shape_that_was_asked_for():
    loaded = bench_model("random:layers=2,hidden=48,heads=6,kv_heads=3,head_dim=10", device="cpu")
    config = loaded.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (2, 48, 10)
    assert (config.num_attention_heads, config.num_key_value_heads) == (6, 3)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.name == "random:layers=2,hidden=48,heads=6,kv_heads=3,head_dim=10"


def test_what_is_not_said_is_that_of_the_default():
    assert random_shape("random") == random_shape(RANDOM)
    assert random_shape("random:layers=3") == random_shape(RANDOM) | {"layers": 3}


def test_the_same_name_is_the_same_model():
    name = "random:layers=1,hidden=16,heads=2,kv_heads=1,head_dim=8"
    one, other = (bench_model(name, device="cpu", dtype="bfloat16").model for _ in range(2))
    assert one.dtype == torch.bfloat16
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:depth=2", "field of a random model='depth' is not one of 'layers', 'hidden'"),
        ("random:layers=two", "layers='two' must be an integer: allowed is >= 1"),
        ("random:layers=0", "layers=0 is out of range: allowed is >= 1"),
        ("random:heads=8,kv_heads=3", "kv_heads=3 must divide heads=8"),
        ("random:head_dim=7", "head_dim=7 must be even"),
        ("./nowhere", "there is no such folder"),
    ],
)
def test_a_wrong_name_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        bench_model(name, device="cpu")
