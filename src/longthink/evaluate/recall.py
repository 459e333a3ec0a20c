"""Attention recall: how much of what dense attention reads does a policy still hold?

``python -m longthink.evaluate.recall --policies recency,raas --budgets 320,512`` measures it on the built-in model,
which follows its worked solutions (teacher forcing), so that every policy sees the same text.

Shapes: B rows, L layers, H query heads, K KV heads, G query heads per KV head, S token slots, N tokens of a text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longthink.hf import make_cache
from longthink.models import load_model
from longthink.policies import Policy, make_policy, needs_budget, policy_spec
from longthink.reasoner import make_problem
from longthink.reasoner.profiles import PROFILES

CONFIDENT = 0.5
"""A step of a head counts as a look-up when dense attention gives one token beyond the last page more than this."""
NEAR = 16
"""Tokens that are near (one page)."""


@torch.no_grad()
def dense_attention(model: Any, ids_N: Tensor) -> Tensor:
    """Return the attention that the model pays to each token of a text without any eviction, LHNN."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        attentions = model(ids_N[None], output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(implementation)
    return torch.cat(attentions)


@torch.no_grad()
def attention_recall(
    model: Any, text_N: Tensor, prompt: int, attention_LHNN: Tensor, policy: Policy, budget: int
) -> dict[str, float]:
    """Feed a text token by token and sum the dense attention that falls on resident tokens.

    Parameters
    ----------
    text_N
        Token ids of prompt and continuation.
    prompt
        Tokens of the prompt.
    attention_LHNN
        From `dense_attention` of the same text.

    Returns
    -------
    dict
        ``mean``: share of the attention kept, mean over decode steps, layers and query heads. ``worst``: the same of
        the layer and query head that keep least. ``lookups``: share kept in the steps in which a head looks something
        up (see `CONFIDENT`), 1 if there is no such step.
    """
    kept: list[Tensor] = []
    with make_cache(model, policy=policy, budget=budget if needs_budget(policy) else None) as cache:
        model(text_N[None, :prompt], past_key_values=cache, use_cache=True)
        for now in range(prompt, len(text_N)):
            model(text_N[None, now : now + 1], past_key_values=cache, use_cache=True)
            row_LHN = attention_LHNN[:, :, now]
            kept.append(
                torch.stack(
                    [_held(layer.slots.position_BKS, row_LHN[i]) for i, layer in enumerate(cache.layers)]
                )
            )
    kept_TLH = torch.stack(kept)
    steps_TLHN = attention_LHNN[:, :, prompt:].permute(2, 0, 1, 3)
    now_T = torch.arange(prompt, len(text_N))
    far_TN = torch.arange(len(text_N)) < now_T[:, None] - NEAR
    lookup_TLH = (steps_TLHN * far_TN[:, None, None]).amax(-1) > CONFIDENT
    return {
        "mean": kept_TLH.mean().item(),
        "worst": kept_TLH.mean(0).min().item(),
        "lookups": kept_TLH[lookup_TLH].mean().item() if bool(lookup_TLH.any()) else 1.0,
    }


def _held(position_BKS: Tensor, row_HN: Tensor) -> Tensor:
    """Attention of each query head that falls on the tokens in the slots, H."""
    position_KS = position_BKS[0].long()
    heads, tables = len(row_HN), len(position_KS)
    index_HS = position_KS.repeat_interleave(heads // tables, 0)
    return (row_HN.gather(1, index_HS.clamp(min=0)) * (index_HS >= 0)).sum(1)


def measure(
    policies: Sequence[Policy], budgets: Sequence[int], *, size: str, count: int, seed: int
) -> list[dict[str, Any]]:
    """Return a row per policy and budget: means over ``count`` problems of each reuse profile."""
    loaded = load_model()
    cells = [(policy, budget) for policy in policies for budget in budgets]
    found: list[list[dict[str, float]]] = [[] for _ in cells]
    for profile in PROFILES:
        for number in range(count):
            problem = make_problem(seed=seed + number, profile=profile, size=size)
            prompt_N = loaded.tokenizer(problem.prompt, return_tensors="pt")["input_ids"][0]
            thought = loaded.tokenizer(problem.solution, add_special_tokens=False, return_tensors="pt")
            text_N = torch.cat([prompt_N, thought["input_ids"][0]])
            attention_LHNN = dense_attention(loaded.model, text_N)
            for (policy, budget), shares in zip(cells, found, strict=True):
                shares.append(
                    attention_recall(loaded.model, text_N, len(prompt_N), attention_LHNN, policy, budget)
                )
    return [
        {"policy": policy_spec(policy), "budget": budget, "problems": len(shares)}
        | {name: sum(share[name] for share in shares) / len(shares) for name in shares[0]}
        for (policy, budget), shares in zip(cells, found, strict=True)
    ]


def main() -> None:
    """Measure attention recall from the command line and print one JSON object a line."""
    parser = argparse.ArgumentParser(description="Attention recall of policies on the built-in model.")
    parser.add_argument("--policies", required=True, help="separated by commas")
    parser.add_argument("--budgets", required=True, help="tokens, prompt included, separated by commas")
    parser.add_argument("--size", default="l", help="size of the problems")
    parser.add_argument("-n", "--count", type=int, default=4, help="problems of each reuse profile")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first problem")
    options = parser.parse_args()
    policies = [make_policy(spec) for spec in options.policies.split(",")]
    budgets = [int(budget) for budget in options.budgets.split(",")]
    for row in measure(policies, budgets, size=options.size, count=options.count, seed=options.seed):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
