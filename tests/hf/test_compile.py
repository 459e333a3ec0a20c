"""The compiled decode step: one program for every call, the tokens of the eager one, clear words where it fails."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import longthink
from longthink.hf import DecodeStep
from longthink.hf import step as step_module
from longthink.kernels.compiled import without_guards
from longthink.policies import RaaS, grows
from tests import fused
from tests.grids import slow_but
from tests.models import EOS, PAD, build, prompt
from tests.recording import Recording

BOUNDED = [p for p in longthink.available_policies() if not grows(longthink.make_policy(p))]
BATCHES = ((5, 30), (18, 9), (40, 3))


@pytest.fixture(autouse=True)
def fresh_compiler():
    counters.clear()
    yield
    torch.compiler.reset()


def wide(architecture, **shape):
    """A model in float64: programs add in another order, and equal tokens must not hang on that."""
    return build(architecture, **shape).double()


def both(model, lengths, seed=0, **options):
    """Tokens of the eager and of the compiled step."""
    ids, mask = prompt(lengths, seed)
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": PAD} | options
    return [longthink.generate(model, ids, mask, compile=how, **options).tolist() for how in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [*BOUNDED, "dense"])
def test_one_program_serves_every_call_and_writes_the_tokens_of_the_eager_step(policy, light_compiler):
    model = wide("qwen2", num_hidden_layers=2 if policy == "raas" else 1)
    budget = {} if policy == "dense" else {"budget": 64}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, lengths in enumerate(BATCHES):
            eager, compiled = both(model, lengths, seed, policy=policy, **budget)
            assert compiled == eager
    # The step, and what opens pages.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "lengths"), [("raas", (21, 4)), ("raas", (21,) * 6), ("milestone", (21, 4))]
)
def test_the_whole_compiler_writes_the_tokens_of_the_eager_step(policy, lengths):
    # Layers share what is compiled of them, so it takes two to see one get what is another's.
    eager, compiled = both(build("qwen2"), lengths, policy=policy, budget=64)
    assert compiled == eager


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["raas", "raas:sharing=layer", "milestone", "h2o", "quest"])
def test_the_step_of_a_gpu_is_one_program_as_well(policy, light_compiler, monkeypatch):
    """Appending and reading as one call, and pages evicted for all layers behind the program: here in torch."""
    model = wide("qwen2", num_hidden_layers=2 if policy == "raas" else 1)
    fused.force(monkeypatch)
    monkeypatch.setattr(step_module, "_SharedLayer", step_module._StaticLayer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, lengths in enumerate(BATCHES):
            eager, compiled = both(model, lengths, seed, policy=policy, budget=64)
            assert compiled == eager
    # Turning pages is a program where it is more than what the kernel for all layers does.
    assert counters["stats"]["unique_graphs"] == (2 if policy in ("milestone", "quest", "recall") else 1)
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("policy", "on_fused_route"),
    slow_but(itertools.product(BOUNDED, (False, True)), ("raas", False), ("milestone", True)),
)
def test_a_recorded_step_can_be_replayed(policy, on_fused_route, monkeypatch):
    """All state changes in place and every tensor keeps its place, or a CUDA graph would write other tokens."""
    model, recording, steps = build("qwen2", num_hidden_layers=1), Recording(), 45
    if on_fused_route:
        fused.force(monkeypatch)
    ids, mask = prompt((21, 4))
    token_NB1 = torch.randint(3, 90, (steps, 2, 1))
    given, logits = [], []

    def replayed(function, *args):
        if function is not step_module._forward:
            return function(*args)
        if not given:
            given.extend(tensor.clone() for tensor in args[2:])
            with recording:
                logits.append(function(*args[:2], *given))
        else:
            for place, tensor in zip(given, args[2:], strict=True):
                place.copy_(tensor)
            recording.replay()
        return logits[0].clone()

    found = []
    for run in (None, replayed):
        with longthink.make_cache(model, policy=policy, budget=48) as cache, torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            step = DecodeStep(model, cache, compile=False)
            step._run = run or step._run
            found.append([step(token_B1) for token_B1 in token_NB1])
            assert cache.num_evicted > 0
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "sizes"), [("raas", 1), ("dense", 3)])
def test_guards_are_asked_again_where_sizes_change(policy, sizes, light_compiler, monkeypatch):
    model = wide("qwen2", num_hidden_layers=1)
    cache = longthink.make_cache(model, policy=policy, **({} if policy == "dense" else {"budget": 64}))
    ids, _ = prompt((21,))
    asked = []

    def noted(program):
        asked.append((id(program), cache.sizes))
        return without_guards(program)

    monkeypatch.setattr(step_module, "without_guards", noted)
    with cache, torch.no_grad():
        token = model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        step = DecodeStep(model, cache, compile=True)
        for _ in range(40):
            step(token)
    assert len(asked) == len(set(asked))
    assert len({one for _, one in asked}) == sizes
    assert len({program for program, _ in asked}) == 2


@pytest.mark.slow
def test_a_budget_on_top_of_the_prompt_needs_no_program_for_each_prompt_length(light_compiler):
    model = wide("qwen2", num_hidden_layers=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, lengths in enumerate(BATCHES):
            eager, compiled = both(model, lengths, seed, policy="raas", decode_budget=32)
            assert compiled == eager


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_other_architectures(architecture, light_compiler):
    eager, compiled = both(build(architecture), (21, 4), policy="raas", budget=64)
    assert compiled == eager


def held(model, length, seed):
    """A cache of one row, and its next token."""
    cache = longthink.make_cache(model, policy="raas", budget=64)
    ids, _ = prompt((length,), seed)
    with torch.no_grad():
        return cache, model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)


@pytest.mark.slow
def test_rows_change_hands_in_place_without_a_new_program(light_compiler):
    model, texts = wide("qwen2", num_hidden_layers=1), {}
    for compile in (False, True):
        cache, token = held(model, 20, 0)
        other, theirs = held(model, 37, 1)
        cache.adopt(1, other)
        token = torch.cat([token, theirs])
        step, texts[compile] = DecodeStep(model, cache, compile=compile), []
        with torch._dynamo.config.patch(error_on_recompile=True):
            for i in range(120):
                if i in (30, 77):
                    other, theirs = held(model, 5 + i // 3, i)
                    cache.adopt(i % 2, other)
                    token[i % 2] = theirs
                token = step(token).argmax(-1, keepdim=True)
                texts[compile].append(token[:, 0].tolist())
    assert texts[True] == texts[False]


class NoWaiting(TorchDispatchMode):
    """Raises where a value of a tensor is brought to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", slow_but(longthink.available_policies(), "raas"))
def test_no_step_waits_for_the_device(policy):
    model = build("qwen2", num_hidden_layers=1)
    ids, mask = prompt((20, 33))
    budget = {} if policy == "dense" else {"budget": 64}
    with longthink.make_cache(model, policy=policy, **budget) as cache, torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, mask, position_ids=positions, past_key_values=cache).logits[:, -1]
        step = DecodeStep(model, cache, compile=False)
        with NoWaiting():
            for _ in range(50):
                logits = step(logits.argmax(-1, keepdim=True))
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            logits.sum().item()


@pytest.mark.slow
def test_sampling_end_tokens_streaming_and_outputs_are_those_of_the_library(light_compiler):
    model = wide("qwen2", num_hidden_layers=1)
    ids, mask = prompt((12, 7))

    class Stream(list):
        put, end = list.append, lambda self: self.append("end")

    found = []
    for compile in (False, True):
        torch.manual_seed(3)
        options = {
            "do_sample": True,
            "temperature": 3.0,
            "eos_token_id": list(range(EOS, 12)),
            "pad_token_id": PAD,
        }
        out = longthink.generate(
            model, ids, mask, policy="raas", budget=64, max_new_tokens=40, compile=compile,
            return_dict_in_generate=True, output_scores=True, output_logits=True, **options,
        )  # fmt: skip
        stream = Stream()
        options = {"policy": "raas", "budget": 64, "max_new_tokens": 4, "do_sample": False}
        longthink.generate(model, ids[:1], streamer=stream, compile=compile, **options)
        found.append((out, [part if part == "end" else part.tolist() for part in stream]))
    (eager, eager_stream), (compiled, compiled_stream) = found
    assert eager.sequences.shape[1] < 12 + 40
    assert compiled.sequences.tolist() == eager.sequences.tolist()
    assert compiled_stream == eager_stream
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(compiled, name), getattr(eager, name), rtol=1e-4, atol=1e-4)
    # The cache goes on in a second turn.
    turns = [
        longthink.generate(
            model, torch.cat([out.sequences, ids], 1), past_key_values=out.past_key_values,
            max_new_tokens=5, do_sample=False, pad_token_id=PAD, compile=how,
        )
        for out, how in ((eager, False), (compiled, True))
    ]  # fmt: skip
    assert turns[0].tolist() == turns[1].tolist()


@dataclass(frozen=True, kw_only=True)
class Waits(RaaS):
    """A policy that no compiler takes: it looks at a value."""

    name = "waits"

    def observe(self, table, step):
        if table.now_B.amax().item() >= 0:
            super().observe(table, step)


@pytest.mark.slow
def test_a_policy_that_cannot_be_compiled_runs_eagerly_or_is_a_clear_error(monkeypatch, caplog):
    model = wide("qwen2", num_hidden_layers=1)
    ids, _ = prompt((20,))
    options = {"policy": Waits(), "budget": 64, "max_new_tokens": 50, "do_sample": False}
    with pytest.raises(
        longthink.UnsupportedFeatureError, match=r"decode step of policy 'waits' cannot be compiled"
    ):
        longthink.generate(model, ids, compile=True, **options)
    monkeypatch.setattr(step_module, "PAYS_FROM", 50)
    auto = longthink.generate(model, ids, compile="auto", **options)
    assert "'waits' cannot be compiled" in caplog.text
    assert auto.tolist() == longthink.generate(model, ids, compile=False, **options).tolist()


def test_auto_compiles_only_where_it_pays_or_is_done_already(monkeypatch, light_compiler, caplog):
    model = wide("qwen2", num_hidden_layers=1)
    ids, _ = prompt((20,))

    def programs(**options):
        longthink.generate(
            model,
            ids,
            policy="recency:page_size=16",
            budget=64,
            do_sample=False,
            max_new_tokens=12,
            **options,
        )
        return counters["stats"]["unique_graphs"]

    assert programs() == 0
    monkeypatch.setattr(step_module, "PAYS_FROM", 12)
    monkeypatch.setattr(step_module, "_has_compiler", lambda device: False)
    assert programs() == 0
    monkeypatch.setattr(step_module, "_has_compiler", lambda device: True)
    assert not caplog.text
    assert programs(num_beams=2) == 0
    assert programs() == 1
    assert caplog.text.count("compiling the decode step of policy 'recency:page_size=16'") == 1
    calls = []
    monkeypatch.setattr(step_module, "PAYS_FROM", 1000)
    run = DecodeStep._run
    monkeypatch.setattr(
        DecodeStep, "_run", lambda self, *args: calls.append(self.compiled) or run(self, *args)
    )
    assert programs() == 1
    assert all(calls) and len(calls) == 11


def test_bad_values_are_refused():
    model = wide("qwen2", num_hidden_layers=1)
    ids, _ = prompt((20,))
    with pytest.raises(ValueError, match=r"compile='on' is not one of 'auto', True, False"):
        longthink.generate(model, ids, budget=64, compile="on")
    with pytest.raises(
        longthink.UnsupportedFeatureError, match=r"compile=True cannot be used with num_beams=2"
    ):
        longthink.generate(model, ids, budget=64, compile=True, num_beams=2)
    cache, token = held(model, 20, 0)
    with pytest.raises(longthink.CacheStateError, match="holds 1 rows and was given 2"):
        DecodeStep(model, cache, compile=False)(torch.cat([token, token]))
    cache.close()
    with pytest.raises(longthink.CacheStateError, match="closed"):
        DecodeStep(model, cache, compile=False)(token)


@pytest.mark.slow
def test_nothing_of_the_compiler_is_left_set(light_compiler):
    before = torch._dynamo.config.get_config_copy()
    both(
        wide("qwen2", num_hidden_layers=1), (20,), policy="recency:page_size=16", budget=64, max_new_tokens=3
    )
    assert torch._dynamo.config.get_config_copy() == before


@pytest.mark.slow
def test_compiling_is_announced_before_it_starts_and_once(light_compiler, caplog):
    model = wide("qwen2", num_hidden_layers=1)
    ids, mask = prompt((20, 20))

    def announced(rows=1, tokens=4, **options):
        caplog.clear()
        longthink.generate(
            model, ids[:rows], mask[:rows], policy="recency", budget=64, do_sample=False, max_new_tokens=tokens,
            pad_token_id=PAD, **options,
        )  # fmt: skip
        return [record for record in caplog.records if record.name.startswith("longthink.")]

    assert announced(compile=False) == announced(compile="auto") == []
    # The only token comes from the prompt: nothing is compiled.
    assert announced(compile=True, tokens=1) == []
    # A step that never ran has compiled nothing either.
    with longthink.make_cache(model, policy="recency", budget=64) as cache:
        model(ids[:1], past_key_values=cache)
        DecodeStep(model, cache, compile=True)
        assert not step_module.compiles(model, cache, "auto", rows=1, tokens=4)
    (record,) = announced(compile=True)
    assert record.levelname == "WARNING"  # shown by default
    assert "about a minute" in record.getMessage() and "compile=False" in record.getMessage()
    assert announced(compile=True) == announced(compile="auto") == []
    assert len(announced(compile=True, rows=2)) == 1
