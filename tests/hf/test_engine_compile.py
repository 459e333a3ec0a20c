"""The engine on compiled steps: one program for any number of requests, each with the tokens that it gets alone."""

import pytest
import torch
from torch._dynamo.utils import counters

import longthink
from longthink.hf import Engine, Request
from longthink.hf import step as step_module
from longthink.hf.step import DecodeStep
from tests.grids import by_day
from tests.hf.test_compile import Waits, wide
from tests.hf.test_engine_rows import LENGTHS, LIMITS, alone, budget_of, requests, stream


@pytest.fixture
def shapes(monkeypatch):
    """Rows of each step, and whether it was compiled."""
    seen, call = [], DecodeStep.__call__

    def spy(self, token_B1):
        seen.append((len(token_B1), self.compiled))
        return call(self, token_B1)

    monkeypatch.setattr(DecodeStep, "__call__", spy)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "given"),
    by_day(
        [
            ("raas", "budget"),
            ("milestone", "decode_budget"),
            ("h2o", "decode_budget"),
            ("dense", "decode_budget"),
        ],
        [
            ("raas", "budget"),
            *((p, "decode_budget") for p in ("raas", "milestone", "streaming_llm", "h2o", "dense")),
        ],
    ),
)
def test_one_program_serves_all_requests_with_the_tokens_of_the_eager_engine(
    policy, given, light_compiler, shapes
):
    model, asked = wide("qwen2", num_hidden_layers=1), requests(LENGTHS[:6], LIMITS[3:9])
    budget = budget_of(policy, **{given: dict(budget=80, decode_budget=24)[given]})
    eager = stream(model, asked, policy, budget, seats=3, compile=False)
    shapes.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = stream(model, asked, policy, budget, seats=3, compile=True)
        # Another engine, with other neighbours, finds the program there.
        again = stream(model, asked[:2], policy, budget, seats=3)
    assert set(shapes) == {(3, True)}
    # The step, and what opens pages.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    for tag, done in eager.items():
        assert (compiled[tag].tokens, compiled[tag].evicted) == (done.tokens, done.evicted)
        assert tag not in again or again[tag].tokens == done.tokens


@pytest.mark.slow
def test_rows_that_read_different_numbers_of_pages(light_compiler):
    """The largest cap is a number of Quest's program: the slots keep their shape while it changes."""
    model, budget = wide("qwen2", num_hidden_layers=1), longthink.Budget(decode_budget=24)
    asked = requests((90, 5, 40), (20, 40, 12))
    compiled = stream(model, asked, "quest", budget, seats=2, compile=True)
    for request in asked:
        assert compiled[request.tag].tokens == alone(model, request, "quest", budget, compile=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", by_day(["bfloat16"], [None, "bfloat16"]))
def test_the_whole_compiler_and_narrow_keys(dtype):
    model, budget = wide("qwen2", num_hidden_layers=1), longthink.Budget(decode_budget=24)
    asked = requests((5, 40, 17), (50, 20, 40))
    compiled = stream(model, asked, "milestone", budget, seats=2, kv_dtype=dtype, compile=True)
    for request in asked:
        tokens, cache = alone(model, request, "milestone", budget, kv_dtype=dtype, compile=False)
        assert compiled[request.tag].tokens == tokens
    assert cache.layers[0].slots._store.keys_BKSD.dtype == (torch.bfloat16 if dtype else torch.float64)
    torch.compiler.reset()


@pytest.mark.slow
def test_auto_changes_over_after_as_many_steps_as_would_have_paid(
    light_compiler, monkeypatch, shapes, caplog
):
    """Not because many tokens were asked for: an answer may end after a few."""
    model, budget = wide("qwen2", num_hidden_layers=1), longthink.Budget(decode_budget=24)
    asked = requests((5, 9, 12, 3, 7, 20), (30, 12, 50, 30, 6, 40))
    expected = [alone(model, request, "raas", budget, compile=False)[0] for request in asked]
    monkeypatch.setattr(step_module, "_has_compiler", lambda device: True)
    for pays_from in (1000, 20, 0):
        monkeypatch.setattr(step_module, "PAYS_FROM", pays_from)
        shapes.clear(), caplog.clear(), step_module._programs.clear(), torch.compiler.reset()
        done = stream(model, asked, "raas", budget, seats=3)
        assert [done[request.tag].tokens for request in asked] == expected
        compiled = [shape for shape in shapes if shape[1]]
        assert bool(compiled) == (pays_from < 1000) == ("compiling the decode step" in caplog.text)
        assert set(compiled) <= {(3, True)}
        assert len(shapes) - len(compiled) == min(pays_from, len(shapes))
        # From there on every step is compiled.
        assert shapes[len(shapes) - len(compiled) :] == compiled


@pytest.mark.slow
def test_an_empty_seat_does_not_grow(light_compiler):
    with Engine(wide("qwen2", num_hidden_layers=1), policy="dense", seats=2, compile=True) as running:
        (done,) = running.map([Request(key="0", tokens=(5, 6, 7), max_new_tokens=150)])
        batch = running._scheduler._batch
        lengths = batch._cache.layers[0].slots.length_B.tolist()
        (again,) = running.map([Request(key="0", tokens=(5, 6, 7), max_new_tokens=9)])
        assert again.tokens == done.tokens[:9]
    assert batch._cache is None
    assert len(done.tokens) == 150
    assert lengths[0] == 3 + 149
    assert lengths[1] <= 65


@pytest.mark.slow
def test_what_cannot_be_compiled_goes_on_eagerly_or_says_why(monkeypatch, shapes, caplog):
    model, budget = wide("qwen2", num_hidden_layers=1), longthink.Budget(decode_budget=24)
    asked = requests((5, 9, 12), (30, 4, 20))
    expected = [alone(model, request, Waits(), budget)[0] for request in asked]
    with Engine(model, policy=Waits(), decode_budget=24, seats=2, compile=True) as engine:
        with pytest.raises(longthink.EngineError, match="cannot be compiled"):
            engine.submit(asked[0].tokens, max_new_tokens=5).result(60)
    monkeypatch.setattr(step_module, "PAYS_FROM", 0)
    step_module._programs.clear()
    shapes.clear()
    done = stream(model, asked, Waits(), budget, seats=2)
    assert [done[i].tokens for i in range(3)] == expected
    assert caplog.text.count("'waits' cannot be compiled") == 1
    # The batch is as small again as there are rows.
    assert shapes[0] == (2, True) and (1, False) in shapes
