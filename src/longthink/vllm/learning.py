"""What the steps of a whole page teach a policy that learns from attention weights, all at once.

Kernels that read a cache say nothing of weights, and what a policy has learned matters only when a page gives way.
So the queries of a page are kept until it is full: a matrix product of them with the keys then gives what each step
would have shown, because what is resident does not change while a page is written, but for the page's own tokens.

Shape suffixes: N rows of all layers (layer after layer), K KV heads, T tokens in a page, H query heads, G query heads
of a KV head, S token slots, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longthink.kernels.reference import wide_dtype
from longthink.policies import PageTable, Policy, Step


class Learning(NamedTuple):
    """What learning takes beside a table: the number of query heads, and see `longthink.policies.Step`."""

    heads: int
    scaling: float
    agree: Callable[[Tensor], Tensor] | None


def learn_page(policy: Policy, table: PageTable, query_NTHD: Tensor, learning: Learning) -> None:
    """Let a policy observe the steps of the page that ended just before `now_B`, one after the other.

    Parameters
    ----------
    table
        What is there when the page is full, with keys; its state is replaced.
    query_NTHD
        The queries of the page's tokens. Those of a prompt's tokens are not looked at.
    """
    tokens, keys_NKSD = table.page_size, table.keys_BKSD.to(wide_dtype(table.keys_BKSD.dtype))
    query_NKTGD = query_NTHD.unflatten(2, (keys_NKSD.shape[1], -1)).transpose(1, 2)
    within_T = torch.arange(tokens, device=table.now_B.device)
    now_TN = (table.now_B - tokens + within_T[:, None]).to(table.position_BKS.dtype)
    position_TNKS = torch.where(table.position_BKS <= now_TN[..., None, None], table.position_BKS, -1)
    logits_NKMS = query_NKTGD.flatten(2, 3).to(keys_NKSD.dtype) @ keys_NKSD.transpose(2, 3) * learning.scaling
    away_NKT1S = (position_TNKS < 0).permute(1, 2, 0, 3)[:, :, :, None]
    logits_NKTGS = logits_NKMS.unflatten(2, (tokens, -1)).masked_fill(away_NKT1S, -torch.inf)
    weights_NKTGS = logits_NKTGS.softmax(-1)
    for at in range(tokens):
        now_N = now_TN[at]
        state = {name: tensor.clone() for name, tensor in table.state.items()}
        then = dataclasses.replace(table, now_B=now_N, position_BKS=position_TNKS[at], state=state)
        step = Step(query_NKTGD[:, :, at], weights_NKTGS[:, :, at], learning.scaling, learning.agree)
        policy.observe(then, step)
        for name, before in table.state.items():
            taught_N = (now_N >= table.prompt_B).view(-1, *[1] * (before.ndim - 1))
            table.state[name] = torch.where(taught_N, state[name], before)
