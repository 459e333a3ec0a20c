"""A known text through the decode steps, many tokens a call: what the same tokens give one by one."""

import logging
from functools import partial

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from longthink.config import Budget
from longthink.errors import CacheStateError
from longthink.hf import DecodeStep, PagedCache
from longthink.kernels.compiled import compile_isolated
from longthink.lab.evaluate import forced
from longthink.lab.evaluate.forced import ForcedDecode
from longthink.policies import Quest, RaaS, needs_budget
from tests.grids import by_day, slow_but
from tests.models import build, prompt
from tests.variants import BUILT_IN

BUDGET, TOKENS = 16, 40
BLOCKS = (1, 7, 1, 20, 11)
COMPILED = ("h2o pinned", "milestone", "quest", "raas", "random", "recall", "dense")
QUICK = ("h2o pinned", "milestone", "quest", "raas", "streaming_llm")


@pytest.fixture(scope="module")
def model():
    return build("qwen2", num_hidden_layers=2).double()


def begin(model, policy):
    cache = PagedCache(model, policy, Budget(decode_budget=BUDGET) if needs_budget(policy) else None)
    ids, mask = prompt((9, 14))
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache, torch.randint(3, 90, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def one_by_one(model, policy):
    cache, token_BN = begin(model, policy)
    step = DecodeStep(model, cache, compile=False)
    with cache:
        logits = [step(token_B1) for token_B1 in token_BN.split(1, 1)]
    return torch.stack(logits, 1), cache


def in_blocks(model, policy, *, blocks=BLOCKS, compile=False):
    cache, token_BN = begin(model, policy)
    step = ForcedDecode(model, cache, compile=compile)
    with cache:
        logits = [step(block_BN) for block_BN in token_BN.split(list(blocks), 1)]
    return torch.cat(logits, 1), cache


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], atol=1e-8, rtol=1e-8)
    for mine, theirs in zip(found[1].layers, wanted[1].layers, strict=True):
        assert mine.slots.resident_positions() == theirs.slots.resident_positions()
        assert (mine.columns, mine.slots.rows.lengths) == (theirs.columns, theirs.slots.rows.lengths)


@pytest.mark.parametrize("name", slow_but(BUILT_IN, *QUICK))
def test_a_block_gives_what_its_tokens_give_one_by_one(model, name):
    assert_same(in_blocks(model, BUILT_IN[name]), one_by_one(model, BUILT_IN[name]))


def assert_compiled_step_is_the_same(model, name):
    assert_same(in_blocks(model, BUILT_IN[name], compile=True), one_by_one(model, BUILT_IN[name]))
    programs = [program for (_, policy, _), program in forced._programs.items() if policy == BUILT_IN[name]]
    assert programs and not {forced._step, forced._open_and_step} & set(programs)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_so_does_the_compiled_step(model, name, monkeypatch):
    """Found and guarded as one program, but not made fast: of that, one policy is enough by day."""
    monkeypatch.setattr(forced, "compile_isolated", partial(compile_isolated, backend="eager"))
    monkeypatch.setattr(forced, "_programs", {})
    assert_compiled_step_is_the_same(model, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", by_day(["milestone"], COMPILED))
def test_so_does_the_step_of_the_whole_compiler(model, name):
    assert_compiled_step_is_the_same(model, name)


def test_ordinary_steps_go_on_from_there(model):
    policy = RaaS(page_size=4)
    wanted, cache = one_by_one(model, policy)
    part, going = begin(model, policy)
    with part:
        ForcedDecode(model, part)(going[:, :30])
        step = DecodeStep(model, part, compile=False)
        logits = torch.stack([step(token_B1) for token_B1 in going[:, 30:].split(1, 1)], 1)
    torch.testing.assert_close(logits, wanted[:, 30:], atol=1e-8, rtol=1e-8)
    assert part.resident_positions(1) == cache.resident_positions(1)


def test_a_step_that_cannot_be_compiled_is_run_eagerly_and_said_once(model, monkeypatch, caplog):
    def fails(function):
        def program(*args):
            raise TorchDynamoException("no such luck")

        return program

    monkeypatch.setattr(forced, "compile_isolated", fails)
    monkeypatch.setattr(forced, "_programs", {})
    policy = Quest(page_size=8)
    with caplog.at_level(logging.WARNING, logger="longthink"):
        assert_same(in_blocks(model, policy, compile=True), one_by_one(model, policy))
    assert [record.getMessage() for record in caplog.records] == [
        "the decode step of policy 'quest:page_size=8' cannot be compiled (no such luck): decoding eagerly"
    ] * 2  # with and without a page that opens


def test_a_cache_that_is_closed_or_of_another_model_or_has_other_rows_is_refused(model):
    cache, token_BN = begin(model, RaaS())
    with pytest.raises(CacheStateError, match="another model"):
        ForcedDecode(build("qwen2"), cache)
    step = ForcedDecode(model, cache)
    with pytest.raises(CacheStateError, match="holds 2 rows and was given 1"):
        step(token_BN[:1])
    cache.close()
    with pytest.raises(CacheStateError, match="closed"):
        step(token_BN)
