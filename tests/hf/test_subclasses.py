"""A subclass of a built-in policy, or a policy that wraps one, is right on every route: never silently the parent.

Routes: the eager step, the compiled step, and the fused route of a GPU, forced on, on a CPU. (vLLM: `tests/vllm`.)
"""

import pytest
import torch

from longthink.accelerators.table import FUSED
from longthink.config import Budget
from longthink.hf import DecodeStep, PagedCache
from longthink.policies import needs_budget
from tests import fused
from tests.grids import slow_but
from tests.models import build, prompt
from tests.variants import BUILT_IN, keep_first, override, subclasses, wrappers

BUDGET, STEPS = 16, 28
VARIANTS = dict([*subclasses(), *wrappers()])
COMPILED = [
    name for name in VARIANTS
    if (name.startswith("raas: ") and not name.endswith((": pins_prompt", ": required_pages", ": tables")))
    or name in ("milestone: moves", "milestone: observe", "milestone: worth", "h2o pinned: observe",
                "h2o pinned: protected", "keep_first: milestone", "keep_first: raas", "keep_first: h2o pinned",
                "h2o: pins_prompt", "streaming_llm: shift_keys", "quest: select", "random: worth")
]  # fmt: skip
"""Compiling takes seconds: every hook of one policy, and what is special of the others, stand for all of them."""
QUICK = (
    "h2o: trim", "h2o pinned: pins_prompt", "keep_first: milestone", "milestone: moves", "quest: select",
    "raas: for_layer", "raas exact: worth", "raas layer: tables", "recency: protected",
)  # fmt: skip
"""Every policy that kernels serve."""


@pytest.fixture(scope="module")
def model():
    return build("qwen2", num_hidden_layers=2).double()


def decode(model, policy, *, compile=False, table=None):
    """Logits of each step, and what both layers hold at the end."""
    budget = Budget(decode_budget=BUDGET) if needs_budget(policy) else None
    ids, mask = prompt((9, 14))
    token_NB1 = torch.randint(3, 90, (STEPS, 2, 1), generator=torch.Generator().manual_seed(3))
    with PagedCache(model, policy, budget, fused=table) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        step = DecodeStep(model, cache, compile=compile)
        logits = [step(token_B1) for token_B1 in token_NB1]
        held = [layer.slots for layer in cache.layers]
        return torch.stack(logits), [layer.resident_positions() for layer in held], held


def state(layers):
    return [layer.store.table.state for layer in layers]


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], atol=1e-8, rtol=1e-8)
    assert found[1] == wanted[1]
    for mine, theirs in zip(state(found[2]), state(wanted[2]), strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(mine[name], tensor, atol=1e-5, rtol=1e-5)


def on_fused_route(model, policy, monkeypatch):
    """Decode with kernels wherever they are allowed; they are stand-ins that fail, unless `policy` may take them."""
    fused.force(monkeypatch)
    return decode(model, policy, table=FUSED)


@pytest.mark.parametrize("name", slow_but(VARIANTS, *QUICK))
def test_the_fused_route_leaves_what_it_was_not_made_for_alone(name, model, monkeypatch):
    wanted = decode(model, VARIANTS[name])
    found = on_fused_route(model, VARIANTS[name], monkeypatch)
    served = [type(layer.policy) for layer in found[2] if layer.is_fused]
    assert type(VARIANTS[name]) not in served
    assert_same(found, wanted)


@pytest.mark.parametrize("name", slow_but(BUILT_IN, "raas", "milestone"))
def test_built_in_policies_are_the_same_on_the_fused_route(name, model, monkeypatch):
    from longthink.accelerators.table import FUSED

    wanted = decode(model, BUILT_IN[name])
    found = on_fused_route(model, BUILT_IN[name], monkeypatch)
    assert any(layer.is_fused for layer in found[2]) == (type(BUILT_IN[name]) in FUSED)
    assert_same(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_the_compiled_step_does_as_the_eager_one(name, light_compiler):
    # Each layer is traced anew, and only one hook is about a second one.
    model = build("qwen2", num_hidden_layers=2 if name.endswith("for_layer") else 1).double()
    assert_same(decode(model, VARIANTS[name], compile=True), decode(model, VARIANTS[name]))


@pytest.mark.parametrize(
    ("name", "hook"),
    slow_but(
        [(name, hook) for name in ("raas", "milestone") for hook in ("observe", "worth", "protected")]
        + [("h2o pinned", "observe"), ("h2o pinned", "worth"), ("random", "protected")],
        ("milestone", "observe"),
        ("raas", "worth"),
        ("random", "protected"),
    ),
)
def test_what_is_overridden_shows(name, hook, model):
    """Or the tests above would compare a subclass with a subclass that nobody asks."""
    ours, theirs = decode(model, override(BUILT_IN[name], hook)), decode(model, BUILT_IN[name])
    assert ours[1] != theirs[1] or any(
        not torch.equal(mine[kind], other[kind])
        for mine, other in zip(state(ours[2]), state(theirs[2]), strict=True)
        for kind in other
    )


@pytest.mark.parametrize("name", slow_but(["raas", "milestone", "recency", "random"], "raas"))
def test_a_wrapper_keeps_the_first_steps_and_then_does_as_the_wrapped_policy(name, model):
    wrapped = keep_first()(steps=6, page_size=4, then=BUILT_IN[name])
    _, held, _ = decode(model, wrapped)
    for layer in held:
        for row, length in zip(layer, (9, 14), strict=True):
            for positions in row:
                assert set(range(length + 6)) <= set(positions)
                assert len(positions) < length + STEPS
    nothing = keep_first()(steps=0, page_size=4, then=BUILT_IN[name])
    assert_same(decode(model, nothing), decode(model, BUILT_IN[name]))
