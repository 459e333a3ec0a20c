"""The compiled decode step of caches at few bits: one program, and the tokens of the eager step."""

import itertools

import pytest
import torch
from torch._dynamo.utils import counters

import longthink
from tests.grids import by_day, covering
from tests.models import PAD, build, prompt

POLICIES = ("recall", "raas", "dense")
BITS = ("4/2:window=32", "3:page=16:window=16:prompt=packed")
BATCHES = ((5, 30), (18, 9), (70, 3))


@pytest.fixture(autouse=True)
def fresh_compiler():
    counters.clear()
    yield
    torch.compiler.reset()


def both(model, lengths, seed=0, **options):
    ids, mask = prompt(lengths, seed)
    options = {"max_new_tokens": 150, "do_sample": False, "pad_token_id": PAD} | options
    return [longthink.generate(model, ids, mask, compile=how, **options).tolist() for how in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "kv_bits"), by_day(covering(POLICIES, BITS), itertools.product(POLICIES, BITS))
)
def test_one_program_serves_every_call(policy, kv_bits, light_compiler):
    model = build("qwen2", num_hidden_layers=1).double()
    budget = {} if policy == "dense" else {"decode_budget": 64}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, lengths in enumerate(BATCHES):
            eager, compiled = both(model, lengths, seed, policy=policy, kv_bits=kv_bits, **budget)
            assert compiled == eager
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("kv_bits", by_day([3], [4, 3]))
def test_the_whole_compiler_writes_the_tokens_of_the_eager_step(kv_bits):
    model = build("qwen2", num_hidden_layers=3).double()
    eager, compiled = both(model, (21, 4), policy="raas", decode_budget=96, kv_bits=kv_bits)
    assert compiled == eager


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dense", "quest"])
def test_a_cache_that_grows_beyond_its_slots_is_not_read_with_the_old_program(policy, light_compiler):
    """Only the packed slots grow; the program is looked at again when they do."""
    model = build("qwen2", num_hidden_layers=1).double()
    budget = {} if policy == "dense" else {"budget": 96}
    eager, compiled = both(model, (9,), policy=policy, kv_bits=8, max_new_tokens=400, **budget)
    assert compiled == eager
