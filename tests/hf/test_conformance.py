"""Every policy on every architecture, driven by the registry: a new policy is tested by being registered."""

import itertools
from functools import cache

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import longthink
from longthink.policies import grows, needs_budget
from tests.grids import by_day, covering, slow_but
from tests.models import ARCHITECTURES, build, prompt

POLICIES = longthink.available_policies()
BOUNDED = [name for name in POLICIES if not grows(longthink.make_policy(name))]
VARIANTS = [
    "raas:score=exact",
    "raas:used=alpha:alpha=0.05",
    "raas:score=exact:used=alpha:alpha=0.3",
    "raas:sharing=layer",
    "raas:pin_prompt=false",
    "raas:dense_layers=1",
    "raas:page_size=1",
    "h2o:pin_prompt=true",
    "quest:dense_layers=1",
    "streaming_llm:positions=logical",
]
SHADOWED = ("raas", "milestone", "h2o", "random", "recency")


def budget_for(policy: str, tokens: int) -> dict[str, int]:
    return {"decode_budget": tokens} if needs_budget(longthink.make_policy(policy)) else {}


def greedy(model, ids, mask, new_tokens, **options):
    return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **options)


@cache
def written(architecture: str, new_tokens: int) -> tuple:
    """A model, a batch of prompts and their mask, and what the library writes with its own cache."""
    model, (ids, mask) = build(architecture), prompt((33, 20, 1))
    reference = greedy(model, ids, mask, new_tokens)
    assert len(set(reference[0, 33:].tolist())) > 10, "a text that loops would prove little"
    return model, ids, mask, reference


def assert_lossless(architecture: str, policy: str, new_tokens: int) -> None:
    model, ids, mask, reference = written(architecture, new_tokens)
    tokens = longthink.generate(
        model, ids, mask, policy=policy, max_new_tokens=new_tokens, do_sample=False, **budget_for(policy, 300)
    )
    assert torch.equal(tokens, reference)


@pytest.mark.parametrize("policy", slow_but([*POLICIES, *VARIANTS], *POLICIES))
def test_enough_budget_changes_nothing(policy):
    assert_lossless("qwen2", policy, 40)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "architecture"),
    by_day(covering(POLICIES, ARCHITECTURES), itertools.product(POLICIES, ARCHITECTURES)),
)
def test_enough_budget_changes_nothing_over_many_steps(architecture, policy):
    assert_lossless(architecture, policy, 160)


class ShadowAttention:
    """Dense attention with a mask per layer, row, head and step: what the resident sets allow."""

    def __init__(self, layers: int, rows: int, heads: int, length: int) -> None:
        self.allowed = torch.zeros(layers, rows, heads, length, length, dtype=torch.bool)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
        weights = logits.masked_fill(~self.allowed[module.layer_idx], -torch.inf).softmax(-1).nan_to_num()
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


def decode_and_watch(model, ids, mask, text, policy, budget):
    """Feed the text token by token; return logits of each step and the mask that the residents meant."""
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    layers, (rows, start), length = model.config.num_hidden_layers, ids.shape, ids.shape[1] + text.shape[1]
    shadow = ShadowAttention(layers, rows, heads, length)
    padding = start - mask.sum(1)
    causal = torch.ones(start, start, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    shadow.allowed[:, :, :, :start, :start] = causal
    positions = (torch.cat([mask, torch.ones_like(text)], 1).cumsum(1) - 1).clamp(min=0)
    logits = []
    with longthink.make_cache(model, policy=policy, **budget) as cache, torch.no_grad():
        step_mask = mask
        model(ids, attention_mask=mask, position_ids=positions[:, :start], past_key_values=cache)
        for i in range(start, length):
            step_mask = torch.cat([step_mask, step_mask.new_ones(rows, 1)], 1)
            new = text[:, i - start : i - start + 1]
            out = model(
                new, attention_mask=step_mask, position_ids=positions[:, i : i + 1], past_key_values=cache
            )
            logits.append(out.logits[:, -1])
            for layer in range(layers):
                for row, residents in enumerate(cache.resident_positions(layer)):
                    for head in range(heads):
                        kept = torch.tensor(residents[head * kv_heads // heads]) + padding[row]
                        shadow.allowed[layer, row, head, i, kept] = True
    return torch.stack(logits, 1), shadow, positions


def assert_equals_shadow(architecture: str, policy: str) -> None:
    model = build(architecture)
    ids, mask = prompt((21, 9), seed=3)
    text = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(5))
    logits, shadow, positions = decode_and_watch(model, ids, mask, text, policy, {"decode_budget": 20})
    evicted = (~shadow.allowed[:, :, :, -1]).sum()
    assert evicted > 0
    AttentionInterface.register("shadow", shadow)
    AttentionMaskInterface.register("shadow", sdpa_mask)
    model.set_attn_implementation("shadow")
    with torch.no_grad():
        everything = torch.cat([ids, text], 1)
        reference = model(everything, position_ids=positions, use_cache=False).logits[:, ids.shape[1] :]
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "policy",
    slow_but([p for p in (*BOUNDED, *VARIANTS) if not p.startswith(("quest", "streaming_llm"))], *SHADOWED),
)
def test_model_equals_dense_attention_masked_to_the_residents(policy):
    assert_equals_shadow("qwen2", policy)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [*SHADOWED, "streaming_llm:positions=logical"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture_equals_dense_attention_masked_to_the_residents(architecture, policy):
    assert_equals_shadow(architecture, policy)


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_streaming_llm_counts_positions_inside_the_cache(architecture):
    """With one layer a token's keys depend on nothing before it: the kept tokens alone must give the logits."""
    model = build(architecture, num_hidden_layers=1)
    ids, _ = prompt((12,), seed=4)
    text = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(6))
    everything = torch.cat([ids, text], 1)
    with longthink.make_cache(model, policy="streaming_llm:sinks=3", budget=10) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        for i in range(12, 52):
            logits = model(everything[:, i : i + 1], past_key_values=cache).logits[:, -1]
            kept = torch.tensor(cache.resident_positions(0)[0][0])
            assert kept.tolist() == [0, 1, 2, *range(i - 6, i + 1)]
            alone = model(everything[:, kept], use_cache=False).logits[:, -1]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", slow_but(POLICIES, "raas", "milestone"))
def test_bfloat16_runs_within_the_budget(policy):
    model = build("qwen2").to(torch.bfloat16)
    ids, mask = prompt((20, 7))
    out = longthink.generate(
        model,
        ids,
        mask,
        policy=policy,
        max_new_tokens=60,
        return_dict_in_generate=True,
        do_sample=False,
        **budget_for(policy, 24),
    )
    cache = out.past_key_values
    assert out.sequences.shape == (2, 80)
    if policy in BOUNDED:
        assert cache.num_evicted > 0
        assert all(len(head) <= 64 for row in cache.resident_positions(1) for head in row)
