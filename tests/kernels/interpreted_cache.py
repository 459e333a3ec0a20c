"""A cache whose tensors go to the kernels decodes as one in torch. Run by `test_in_interpreter`."""

import pytest
import torch

from longthink import kernels
from longthink.cache import LayerCache
from longthink.config import Budget
from longthink.kernels import triton_step
from longthink.policies import make_policy

STEPS, HEADS, GROUPS, DIM = 80, 2, 3, 16
FUSED = (
    "raas:page_size=4", "raas:page_size=4:sharing=layer", "raas:page_size=4:used=alpha:alpha=0.05",
    "raas:page_size=4:score=exact", "raas:page_size=4:score=exact:sharing=layer",
    "milestone:page_size=4:alpha=0.1:young=8",
    "recency:page_size=4", "random:page_size=4", "fifo:page_size=4", "h2o", "dense",
)  # fmt: skip
NOT_FUSED = ("quest:page_size=4", "streaming_llm:positions=logical")


@pytest.fixture
def launches(monkeypatch):
    """Calls of the fused attention, and of the one without an append."""
    made = {"step_attention": 0, "decode_attention": 0}
    for name in made:
        monkeypatch.setattr(triton_step, name, counting(made, name))
    return made


def counting(made, name):
    run = getattr(triton_step, name)

    def counted(*args, **kwargs):
        made[name] += 1
        return run(*args, **kwargs)

    return counted


def outputs(policy, tokens):
    """Attention outputs of a prompt of two rows and the steps behind it, and the cache."""
    budget = (
        None if not policy.needs_budget else Budget(budget=20) if policy.grows else Budget(decode_budget=24)
    )
    layer = LayerCache(policy, budget)
    valid = torch.arange(14) >= torch.tensor([[5], [0]])
    layer.attend(*(part[:, :, :14] for part in tokens), valid)
    return [layer.attend(*(part[:, :, i : i + 1] for part in tokens)) for i in range(14, 14 + STEPS)], layer


@pytest.mark.parametrize("spec", [*FUSED, *NOT_FUSED])
def test_tokens_go_to_the_same_slots_and_read_the_same(spec, launches, monkeypatch):
    torch.manual_seed(3)
    tokens = [torch.randn(2, heads, 14 + STEPS, DIM) for heads in (HEADS * GROUPS, HEADS, HEADS)]
    # Some look for their own key, so that attention is not flat.
    tokens[0][:, 0, ::3] = 6 * tokens[1][:, 0, ::3]
    policy = make_policy(spec)
    wanted, layer = outputs(policy, tokens)
    assert launches == {"step_attention": 0, "decode_attention": 0}
    monkeypatch.setattr(kernels, "_goes_to_triton", lambda tensor: True)
    got, fused = outputs(policy, tokens)
    fuses = spec in FUSED
    assert launches == {"step_attention": STEPS * fuses, "decode_attention": STEPS * (not fuses)}
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    mine, theirs = fused._store.table, layer._store.table
    assert torch.equal(mine.position_BKS, theirs.position_BKS)
    assert torch.equal(mine.kmin_BKPD, theirs.kmin_BKPD) and torch.equal(mine.kmax_BKPD, theirs.kmax_BKPD)
    for name, tensor in theirs.state.items():
        torch.testing.assert_close(mine.state[name], tensor, atol=1e-4, rtol=1e-5)
    assert policy.grows or layer.num_evicted > 20


@pytest.mark.parametrize(
    ("spec", "asked"), [("raas", True), ("raas:score=exact", True), ("milestone", False), ("h2o", False)]
)
def test_what_the_kernel_learns_is_not_learned_again(spec, asked, monkeypatch):
    """Scores come from the kernel, and state that it writes itself is not asked about."""
    policy = make_policy(spec)
    tokens = [torch.randn(2, heads, 14 + STEPS, DIM) for heads in (HEADS * GROUPS, HEADS, HEADS)]
    seen = []
    monkeypatch.setattr(type(policy), "observe", lambda self, table, step: seen.append(step))
    monkeypatch.setattr(kernels, "_goes_to_triton", lambda tensor: True)
    outputs(policy, tokens)
    assert len(seen) == (STEPS if asked else 0)
    assert all(step.weights_BKGS is None and step.score_BKP is not None for step in seen)
