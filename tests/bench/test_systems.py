"""All systems do the same work on the same model, decoded or fast-forwarded."""

import itertools
from functools import partial

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from longthink.errors import UnsupportedFeatureError
from longthink.lab.bench.systems import make_systems
from tests.bench.conftest import PER_TOKEN
from tests.grids import slow_but

BOUNDED = ("raas", "h2o", "streaming_llm", "recency", "random", "recency:page_size=16")


def systems(loaded, plan, room=32, **changes):
    return {system.name: system for system in make_systems(loaded.model, plan(**changes), room=room)}


def next_tokens(system, count):
    found = []
    for _ in range(count):
        system.decode(1)
        found.append(system._token_B1[:, 0].tolist())
    return found


def test_dense_systems_write_the_same_text_as_generate(loaded, plan):
    made = systems(loaded, plan, policies=("dense",), rows=2)
    prompt = made["dense"].prompt_BN
    text = loaded.model.generate(
        prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    for system in made.values():
        system.go_to(30, fast=False)
        assert next_tokens(system, 9) == text[:, -9:].T.tolist(), system.name


@pytest.mark.parametrize(("rows", "fast"), slow_but(itertools.product((1, 3), (False, True)), (3, True)))
def test_bytes_are_those_of_the_formula(loaded, plan, fast, rows):
    made = systems(loaded, plan, rows=rows)
    for system in made.values():
        system.go_to(150, fast=fast)
    for name in BOUNDED:
        assert made[name].kv_bytes == rows * 96 * PER_TOKEN
        assert 0 < made[name].metadata_bytes < made[name].kv_bytes
    seen = rows * (20 + 150) * PER_TOKEN
    assert made["hf dynamic"].kv_bytes == seen
    assert made["hf static"].kv_bytes == rows * (20 + 150 + 32) * PER_TOKEN
    for name in ("dense", "quest"):
        assert seen <= made[name].kv_bytes <= 1.4 * seen
    assert made["hf dynamic"].metadata_bytes == 0


@pytest.mark.slow
def test_fast_forward_ends_where_decoding_ends(loaded, plan):
    """And the next steps run from there, on the same lengths and bytes."""
    one, other = systems(loaded, plan), systems(loaded, plan)
    for length in (45, 150):
        for name in one:
            one[name].go_to(length, fast=False)
            other[name].go_to(length, fast=True)
            assert one[name].decoded == other[name].decoded == length
            for _ in range(2):
                lengths = [int(system.cache.get_seq_length()) for system in (one[name], other[name])]
                assert lengths == [20 + one[name].decoded] * 2
                assert one[name].kv_bytes == other[name].kv_bytes
                assert one[name].metadata_bytes == other[name].metadata_bytes
                one[name].decode(16)
                other[name].decode(16)


@pytest.mark.slow
def test_made_up_contents_are_everywhere(loaded, plan):
    """No slot is left empty, which would be cheaper to read or not be there in memory at all."""
    made = systems(loaded, plan, room=0)
    for system in made.values():
        system.go_to(300, fast=True)
    for name in ("hf dynamic", "hf static"):
        for layer in made[name].cache.layers:
            assert layer.keys.abs().amin() > 0
            assert layer.values.abs().amin() > 0
    for name in set(made) - {"hf dynamic", "hf static"}:
        for layer in made[name].cache.layers:
            store = layer.slots._store
            used = store.table.resident_BKS.expand(-1, 2, -1)
            assert store.keys_BKSD[used].abs().amin() > 0
            assert store.values_BKSD[used].abs().amin() > 0


def test_a_static_cache_is_made_for_each_length_or_for_the_whole_text(loaded, plan):
    (each,) = make_systems(loaded.model, plan(policies=(), baselines=("static",)), room=8)
    (whole,) = make_systems(loaded.model, plan(policies=(), baselines=("static",)), room=0, whole=200)
    for length in (10, 200):
        each.go_to(length, fast=True)
        whole.go_to(length, fast=False)
        assert each.kv_bytes == (20 + length + 8) * PER_TOKEN
        assert whole.kv_bytes == 220 * PER_TOKEN


def test_the_model_is_left_as_it_was_between_turns(loaded, plan):
    before = loaded.model.config._attn_implementation
    for system in systems(loaded, plan).values():
        for length in (0, 40):
            system.go_to(length, fast=True)
            assert loaded.model.config._attn_implementation == before
        system.decode(1)
        assert loaded.model.config._attn_implementation == before


def test_a_model_that_cannot_be_compiled_is_a_clear_error(loaded, plan, monkeypatch):
    def broken(config):
        def call(**kwargs):
            raise TorchDynamoException("no compiler\nlong story")

        return call

    monkeypatch.setattr(loaded.model, "get_compiled_call", broken)
    (system,) = make_systems(loaded.model, plan(policies=(), baselines=("compiled",)), room=8)
    with pytest.raises(
        UnsupportedFeatureError, match=r"cannot be compiled here \(no compiler\): leave 'compiled'"
    ):
        system.go_to(5, fast=False)


def test_compiled_steps_and_narrow_caches_stand_beside_the_eager_ones(loaded, plan):
    made = systems(loaded, plan, policies=("raas", "dense"), baselines=(), compile=True)
    assert list(made) == ["raas", "raas compiled", "dense", "dense compiled"]
    (narrow,) = make_systems(
        loaded.model, plan(policies=("raas",), baselines=(), kv_dtype="bfloat16"), room=8
    )
    for system in (made["raas"], narrow):
        system.go_to(100, fast=True)
    assert narrow.name == "raas bfloat16"
    assert narrow.kv_bytes * 2 == made["raas"].kv_bytes
    with pytest.raises(ValueError, match="kv_dtype='int4' is not one of"):
        plan(kv_dtype="int4")


@pytest.mark.slow
def test_a_compiled_step_writes_the_same_text(loaded, plan, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    made = systems(loaded, plan, policies=("raas",), baselines=(), compile=True, rows=2)
    for system in made.values():
        system.go_to(110, fast=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert next_tokens(made["raas compiled"], 9) == next_tokens(made["raas"], 9)
    torch.compiler.reset()


@pytest.mark.slow
def test_the_compiled_model_writes_the_same_text(loaded, plan):
    made = systems(loaded, plan, policies=(), baselines=("static", "compiled"))
    for system in made.values():
        system.go_to(3, fast=False)
    assert next_tokens(made["hf static compiled"], 6) == next_tokens(made["hf static"], 6)
    torch.compiler.reset()
