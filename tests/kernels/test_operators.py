"""The step as it is compiled for a GPU, on a CPU: torch functions stand in for the operators that launch Triton."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import longthink
from longthink import accelerators, kernels
from longthink.hf import step
from longthink.kernels import reference
from longthink.kernels.triton_decode import SideOutput, Slots
from longthink.policies import grows, make_policy
from tests import fused
from tests.gpu.decoding import decode, model_of, routes

pytest.importorskip("triton")
WHOLE = [("dense", "general"), ("raas", "general"), ("raas", "fused"), ("quest", "fused")]
"""Compiled to machine code, and its code looked at; the others are only traced."""


def read(query, keys, values, resident, scaling, with_weights):
    out, weights = reference.decode_attention(query, keys, values, resident, scaling, with_weights=True)
    return out, weights.float() if with_weights else query.new_empty(0)


def take_step(query, key, value, *held):
    slots, (scaling, *side), score = Slots(*held[:8]), held[8:-1], held[-1]
    return fused.step_attention(query, key, value, slots, scaling, SideOutput(*side), score)[0]


def select(query, key, value, *held):
    return fused.select_attention(query, key, value, Slots(*held[:8]), *held[8:])


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Compiled programs call the operators, and are made as they are for a GPU."""
    from longthink.accelerators import triton_tables

    library = torch.library.Library("longthink", "IMPL")
    for name, stand_in in {
        "decode_attention": read,
        "step_attention": take_step,
        "select_attention": select,
    }.items():
        library.impl(name, stand_in, "CPU")
    for function in (fused.evict, fused.move_tokens):
        monkeypatch.setattr(triton_tables, function.__name__, function)
    monkeypatch.setattr(accelerators, "available", lambda tensor: True)
    monkeypatch.setattr(kernels, "runs_triton", lambda tensor: torch.compiler.is_compiling())
    monkeypatch.setattr(step, "_SharedLayer", step._StaticLayer)
    torch.compiler.reset()
    step._programs.clear()
    yield
    torch.compiler.reset()
    step._programs.clear()
    library._destroy()


def steps_of(route):
    from longthink.accelerators.table import FUSED

    return FUSED if route == "fused" else {}


def eager(model, policy, route):
    with pytest.MonkeyPatch.context() as patch:
        if route == "fused":
            fused.force(patch)
        return decode(model, policy, steps_of(route))


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "route"), routes(list(longthink.available_policies())))
def test_the_compiled_step_writes_what_the_eager_one_writes(spec, route, as_on_a_gpu, monkeypatch):
    # What fused steps have in common for all layers takes two to see; every other layer is traced by itself.
    layers = 2 if route == "fused" else 1
    policy, model = make_policy(spec), model_of("qwen2", torch.float32, num_hidden_layers=layers)
    whole = (spec, route) in WHOLE
    monkeypatch.setattr(step, "few_rows_backend", "inductor" if whole else "eager")
    wanted = eager(model, policy, route)
    got, codes = run_and_get_code(decode, model, policy, steps_of(route), compile=True)
    assert got.held == wanted.held
    torch.testing.assert_close(got.logits, wanted.logits, atol=2e-3, rtol=2e-3)
    if whole:
        calls = re.findall(r"longthink\.(\w+)\.default\(", "".join(codes))
        assert (
            set(calls)
            == {
                "general": {"decode_attention"},
                "fused": {"select_attention" if spec == "quest" else "step_attention"},
            }[route]
        )
    if whole and not grows(policy):
        rows, heads, slots, dim = got.cache.paged[0].slots.store.keys_BKSD.shape
        assert f"empty_strided_cpu(({rows}, {heads}, {slots}, {dim})" not in "".join(codes), (
            "keys were copied"
        )
