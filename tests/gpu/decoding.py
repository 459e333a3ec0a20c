"""One text decoded on a device and on the CPU, and how far apart the two are.

Shape suffixes: B rows, H query heads, Q new tokens, N columns of text, V vocabulary.
"""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from longthink.config import Budget
from longthink.hf import DecodeStep, PagedCache
from longthink.policies import Policy, make_policy, needs_budget
from tests.models import build, prompt

PROMPTS, STEPS, BUDGET = (21, 9), 90, 80
"""Lengths of the prompts, tokens decoded behind them, tokens kept: pages of both rows are evicted."""


class Decoded(NamedTuple):
    """Logits of each step (B x steps x V) on the CPU, and for every step, layer, row and KV head what was held."""

    logits: Tensor
    held: list[list[list[list[list[int]]]]]
    cache: PagedCache


def routes(specs: list[str]) -> list[tuple[str, str]]:
    """Every policy by the general route, and by the fused one where it has kernels."""
    if find_spec("triton") is None:
        return [(spec, "general") for spec in specs]
    from longthink.accelerators.table import FUSED

    fused = [spec for spec in specs if type(make_policy(spec)) in FUSED]
    return [(spec, "general") for spec in specs] + [(spec, "fused") for spec in fused]


def model_of(architecture: str, dtype: torch.dtype, **sizes: int) -> PreTrainedModel:
    """A small model on the CPU, in float32, with weights that the format can hold."""
    return build(architecture, hidden_size=64, head_dim=64, num_key_value_heads=2, **sizes).to(dtype).float()


def text() -> Tensor:
    """Tokens that are decoded whatever the model thinks of them, B x steps."""
    return torch.randint(3, 97, (len(PROMPTS), STEPS), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    policy: Policy,
    fused: dict,
    *,
    compile: bool = False,
    watch: bool = True,
    budget: int = BUDGET,
) -> Decoded:
    """Decode the text with the step of `generate`."""
    ids_BN, mask_BN = (x.to(model.device) for x in prompt(PROMPTS, seed=3))
    bound = Budget(budget=budget) if needs_budget(policy) else None
    logits, held = [], []
    with PagedCache(model, policy, bound, fused=fused) as cache:
        position_BN = (mask_BN.cumsum(1) - 1).clamp(min=0)
        model(ids_BN, attention_mask=mask_BN, position_ids=position_BN, past_key_values=cache)
        step = DecodeStep(model, cache, compile=compile)
        for token_B1 in text().to(model.device).split(1, 1):
            logits.append(step(token_B1).float().cpu())
            if watch:
                held.append([cache.resident_positions(layer) for layer in range(len(cache.layers))])
        assert step.compiled == compile
    return Decoded(torch.stack(logits, 1), held, cache)


class Allowed:
    """Attention of the CPU that reads what the device held in each step, and nothing else: in float32, densely."""

    def __init__(self, model: PreTrainedModel, held: list) -> None:
        heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        _, mask_BN = prompt(PROMPTS, seed=3)
        padding_B, start = (mask_BN == 0).sum(1), mask_BN.shape[1]
        length = start + len(held)
        shape = (len(held[0]), len(mask_BN), heads, length, length)
        self.allowed = torch.zeros(shape, dtype=torch.bool)
        causal = torch.ones(start, start, dtype=torch.bool).tril() & mask_BN.bool()[:, None, None]
        self.allowed[:, :, :, :start, :start] = causal
        for i, layers in enumerate(held):
            for layer, rows in enumerate(layers):
                for row, found in enumerate(rows):
                    for head in range(heads):
                        kept = torch.tensor(found[head * kv_heads // heads]) + padding_B[row]
                        self.allowed[layer, row, head, start + i, kept] = True

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
        weights = logits.masked_fill(~self.allowed[module.layer_idx], -torch.inf).softmax(-1).nan_to_num()
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


@torch.no_grad()
def logits_over(model: PreTrainedModel, held: list) -> Tensor:
    """Logits of the text by a model on the CPU that reads exactly what was held, B x steps x V."""
    AttentionInterface.register("allowed", Allowed(model, held))
    AttentionMaskInterface.register("allowed", sdpa_mask)
    model.set_attn_implementation("allowed")
    ids_BN, mask_BN = prompt(PROMPTS, seed=3)
    everything = torch.cat([mask_BN, torch.ones_like(text())], 1)
    position_BN = (everything.cumsum(1) - 1).clamp(min=0)
    out = model(torch.cat([ids_BN, text()], 1), position_ids=position_BN, use_cache=False)
    return out.logits[:, ids_BN.shape[1] :]


def errors(got: Tensor, wanted: Tensor) -> Tensor:
    """Length of the difference of each step's logits, as a share of their own. B x steps."""
    return (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)


def shared(got: list, wanted: list) -> float:
    """Share of what was held that is the same."""
    pairs = [
        (set(a), set(b))
        for mine, theirs in zip(got, wanted, strict=True)
        for layer, other in zip(mine, theirs, strict=True)
        for row, row_of_other in zip(layer, other, strict=True)
        for a, b in zip(row, row_of_other, strict=True)
    ]
    return sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs)
