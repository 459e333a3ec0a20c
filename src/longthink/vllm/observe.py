"""Deferred observation: a policy observes the attention weights of a whole page of steps at once.

Paged attention kernels return no weights, and observations matter only when a page is evicted. So a page's queries
are stored until it is full; one product with the keys then gives the weights of its steps, later tokens masked.
Shape suffixes: see `longthink.vllm.pool`; T tokens in a page, M queries of a KV head.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longthink.kernels.reference import wide_dtype
from longthink.policies import Milestone, PageTable, Policy, RaaS, Recall, Step

AT_ONCE: frozenset[type[Policy]] = frozenset({Milestone, RaaS, Recall})
"""Policies, by exact class, that observe only weights, and observe the steps of a page as one batch: their state is a
maximum over steps, or decays (`_decayed`). Others observe the steps one by one."""


class ObserveOptions(NamedTuple):
    """Number of query heads; for the rest see `longthink.policies.Step`."""

    heads: int
    scaling: float
    over_ranks: Callable[[Tensor], Tensor] | None


def observe_page(
    policy: Policy, table: PageTable, keys_NKSD: Tensor, query_NTHD: Tensor, options: ObserveOptions
) -> None:
    """Let a policy observe the decode steps of the page that ended just before `now_B`.

    `table` and `keys_NKSD` are the residents now that the page is full; queries of prompt tokens are ignored.
    """
    tokens, keys_NKSD = table.page_size, keys_NKSD.to(wide_dtype(keys_NKSD.dtype))
    query_NTKGD = query_NTHD.unflatten(2, (keys_NKSD.shape[1], -1))
    query_NKMD = query_NTKGD.transpose(1, 2).flatten(2, 3).to(keys_NKSD.dtype)
    logits_NKMS = query_NKMD @ keys_NKSD.transpose(2, 3) * options.scaling
    logits_NTKGS = logits_NKMS.unflatten(2, (tokens, -1)).transpose(1, 2)

    position_N1KS, within_T = table.position_BKS[:, None], torch.arange(tokens, device=table.now_B.device)
    now_NT = (table.now_B[:, None] - tokens + within_T).to(position_N1KS.dtype)
    resident_NTKS = (position_N1KS >= 0) & (position_N1KS <= now_NT[..., None, None])
    weights_NTKGS = logits_NTKGS.masked_fill(~resident_NTKS[:, :, :, None], -torch.inf).softmax(-1)
    position_NTKS = torch.where(resident_NTKS, position_N1KS, -1)
    count = tokens if type(policy) in AT_ONCE else 1
    reads_queries = table.vectors is not None or table.key_bounds is not None
    for first in range(0, tokens, count):
        part = (slice(None), slice(first, first + count))
        step = Step(
            query_NTKGD[part].flatten(0, 1) if reads_queries else None,
            weights_NTKGS[part].flatten(0, 1),
            options.scaling,
            options.over_ranks,
        )
        _observe(policy, table, now_NT[part], position_NTKS[part], step)


def _observe(policy: Policy, table: PageTable, now_NT: Tensor, position_NTKS: Tensor, step: Step) -> None:
    """Observe steps that start from the same state, and combine their results."""
    count = now_NT.shape[1]
    each = {name: tensor.repeat_interleave(count, 0) for name, tensor in table.state.items()}
    steps = dataclasses.replace(
        table, position_BKS=position_NTKS.flatten(0, 1), vectors=_masked_vectors(table, position_NTKS),
        now_B=now_NT.flatten(), prompt_B=table.prompt_B.repeat_interleave(count),
        cap_B=table.cap_B.repeat_interleave(count),
        state={name: tensor.clone() for name, tensor in each.items()},
    )  # fmt: skip
    policy.observe(steps, step)
    decodes_B = steps.now_B >= steps.prompt_B
    for name, before in each.items():
        after = torch.where(decodes_B.view(-1, *[1] * (before.ndim - 1)), steps.state[name], before)
        after = after.unflatten(0, (-1, count))
        if isinstance(policy, Recall) and name == "attention":
            table.state[name] = _decayed(table.state[name], after, policy.decay)
        else:
            table.state[name] = after.amax(1)


def _decayed(before_NKS: Tensor, after_NTKS: Tensor, decay: float) -> Tensor:
    """State after steps in turn, each of which leaves `decay` of it and adds something, from that after each alone.

    Steps of prompt tokens neither add to it nor have anything to leave: then it is still zero.
    """
    count = after_NTKS.shape[1]
    share_T = decay ** torch.arange(count - 1, -1, -1, dtype=before_NKS.dtype, device=before_NKS.device)
    new_NTKS = after_NTKS - decay * before_NKS[:, None]
    return before_NKS * decay**count + (new_NTKS * share_T[:, None, None]).sum(1)


def _masked_vectors(table: PageTable, position_NTKS: Tensor) -> tuple[Tensor, Tensor] | None:
    """Keys and values as they were in one step: zeros in place of later tokens of the page."""
    if table.vectors is None or position_NTKS.shape[1] > 1:
        return None
    later_NKS1 = (position_NTKS[:, 0] < 0)[..., None]
    keys, values = (part.masked_fill(later_NKS1, 0) for part in table.vectors)
    return keys, values
