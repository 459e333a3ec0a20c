"""What the steps of a whole page teach a policy that learns from attention weights, all at once.

Kernels that read a cache say nothing of weights, and what a policy has learned matters only when a page gives way.
So the queries of a page are kept until it is full: a matrix product of them with the keys then gives what each step
would have shown, because what is resident does not change while a page is written, but for the page's own tokens.

Shape suffixes: N rows of all layers (layer after layer), K KV heads, T tokens in a page, H query heads, G query heads
of a KV head, M some of them side by side, S token slots, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longthink.kernels.reference import wide_dtype
from longthink.policies import Milestone, PageTable, Policy, RaaS, Step

SIDE_BY_SIDE: frozenset[type[Policy]] = frozenset({Milestone, RaaS})
"""Policies, by exact class, whose state is the largest of what any step gave, and which see nothing but weights when
they learn from weights: their steps can be observed at once. All others see one step after the other."""


class Learning(NamedTuple):
    """What learning takes beside a table: the number of query heads, and see `longthink.policies.Step`."""

    heads: int
    scaling: float
    over_ranks: Callable[[Tensor], Tensor] | None


def learn_page(
    policy: Policy, table: PageTable, keys_NKSD: Tensor, query_NTHD: Tensor, learning: Learning
) -> None:
    """Let a policy observe the steps of the page that ended just before `now_B`: in order, or side by side if it may.

    Parameters
    ----------
    table
        What is there when the page is full; its state is replaced.
    keys_NKSD
        The keys of those tokens.
    query_NTHD
        The queries of the page's tokens. Those of a prompt's tokens are not looked at.
    """
    tokens, keys_NKSD = table.page_size, keys_NKSD.to(wide_dtype(keys_NKSD.dtype))
    query_NTKGD = query_NTHD.unflatten(2, (keys_NKSD.shape[1], -1))
    query_NKMD = query_NTKGD.transpose(1, 2).flatten(2, 3).to(keys_NKSD.dtype)
    logits_NKMS = query_NKMD @ keys_NKSD.transpose(2, 3) * learning.scaling
    logits_NTKGS = logits_NKMS.unflatten(2, (tokens, -1)).transpose(1, 2)

    position_N1KS, within_T = table.position_BKS[:, None], torch.arange(tokens, device=table.now_B.device)
    now_NT = (table.now_B[:, None] - tokens + within_T).to(position_N1KS.dtype)
    there_NTKS = (position_N1KS >= 0) & (position_N1KS <= now_NT[..., None, None])
    weights_NTKGS = logits_NTKGS.masked_fill(~there_NTKS[:, :, :, None], -torch.inf).softmax(-1)
    position_NTKS = torch.where(there_NTKS, position_N1KS, -1)
    many = tokens if type(policy) in SIDE_BY_SIDE else 1
    shows_queries = table.vectors is not None or table.key_bounds is not None
    shown_NTKGD = query_NTKGD if shows_queries else None
    for first in range(0, tokens, many):
        part = (slice(None), slice(first, first + many))
        step = Step(
            None if shown_NTKGD is None else shown_NTKGD[part].flatten(0, 1),
            weights_NTKGS[part].flatten(0, 1),
            learning.scaling,
            learning.over_ranks,
        )
        _observe(policy, table, now_NT[part], position_NTKS[part], step)


def _observe(policy: Policy, table: PageTable, now_NT: Tensor, position_NTKS: Tensor, step: Step) -> None:
    """Observe steps that begin with the same state, and keep the largest of each number."""
    many = now_NT.shape[1]
    each = {name: tensor.repeat_interleave(many, 0) for name, tensor in table.state.items()}
    steps = dataclasses.replace(
        table,
        position_BKS=position_NTKS.flatten(0, 1),
        vectors=_written(table, position_NTKS),
        now_B=now_NT.flatten(),
        prompt_B=table.prompt_B.repeat_interleave(many),
        cap_B=table.cap_B.repeat_interleave(many),
        state={name: tensor.clone() for name, tensor in each.items()},
    )
    policy.observe(steps, step)
    decodes_M = steps.now_B >= steps.prompt_B
    for name, before in each.items():
        after = torch.where(decodes_M.view(-1, *[1] * (before.ndim - 1)), steps.state[name], before)
        table.state[name] = after.unflatten(0, (-1, many)).amax(1)


def _written(table: PageTable, position_NTKS: Tensor) -> tuple[Tensor, Tensor] | None:
    """Keys and values as they were in one step: zeros where later tokens of the page are going to be."""
    if table.vectors is None or position_NTKS.shape[1] > 1:
        return None
    later_NKS1 = (position_NTKS[:, 0] < 0)[..., None]
    keys, values = (part.masked_fill(later_NKS1, 0) for part in table.vectors)
    return keys, values
