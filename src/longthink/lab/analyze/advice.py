"""Advice: the smallest budget, and the policy, that keep what a model reads within a stated loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longthink.cache.store import SlotStore
from longthink.config import Budget, check_choice, check_range
from longthink.lab.analyze.summary import Mean
from longthink.lab.analyze.whatif import BELADY, OPTIMUM
from longthink.policies import Policy, grows, make_policy

MEASURES = ("lookups", "recall")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the memory of a model and its requests depends on.

    Attributes
    ----------
    layers, kv_heads, head_dim, dtype
        Of the KV cache.
    weights
        Bytes of the model's weights.
    prompt, tokens
        Mean tokens of a prompt, and of the longest text with its prompt.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    weights: int
    prompt: int
    tokens: int

    def kv_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens in every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize * tokens


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A policy and a budget, and what they cost.

    Attributes
    ----------
    row
        What was kept.
    kept
        The measure that was asked for.
    kv_bytes, metadata_bytes
        Keys and values of one request, and what the policy notes beside them (positions, stamps, representatives).
    dense_kv_bytes
        Keys and values of one request with everything kept, at the longest text.
    requests, dense_requests
        Requests that fit side by side, bounded and dense.
    """

    row: Mean
    kept: float
    kv_bytes: int
    metadata_bytes: int
    dense_kv_bytes: int
    requests: int
    dense_requests: int

    @property
    def bytes(self) -> int:
        """All that a request takes."""
        return self.kv_bytes + self.metadata_bytes


def advise(
    rows: Sequence[Mean], shape: Shape, *, loss: float = 0.02, measure: str = "lookups", memory: int
) -> list[Advice]:
    """Return what is within the loss, the least memory first; ties go to the policy that keeps more.

    Policies that grow with the text, and those that know the future, are no advice and left out; so is a budget that
    has no room for some of the prompts.

    Parameters
    ----------
    rows
        Means of replays.
    loss
        Share that may be lost of what Dense reads.
    measure
        ``lookups`` or ``recall``.
    memory
        Bytes of the GPU, of which the weights are taken off.

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    check_range("loss", loss, 0.0, 1.0)
    check_choice("measure", measure, MEASURES)
    check_range("memory", memory, 0)
    dense = shape.kv_bytes(shape.tokens)
    room = max(0, memory - shape.weights)
    found = []
    for row in rows:
        kept = getattr(row, measure)
        if row.policy in (BELADY, OPTIMUM) or kept is None or row.no_room or kept < 1 - loss:
            continue
        policy = make_policy(row.policy)
        if grows(policy):
            continue
        kv_bytes, metadata_bytes = request_bytes(
            policy, Budget(budget=row.budget, decode_budget=row.decode_budget), shape
        )
        found.append(
            Advice(
                row=row, kept=kept, kv_bytes=kv_bytes, metadata_bytes=metadata_bytes, dense_kv_bytes=dense,
                requests=room // (kv_bytes + metadata_bytes), dense_requests=room // dense,
            )
        )  # fmt: skip
    return sorted(found, key=lambda one: (one.bytes, -one.kept))


def request_bytes(policy: Policy, budget: Budget, shape: Shape) -> tuple[int, int]:
    """Bytes that the cache of one request takes: keys and values, and all else.

    They are counted on the slots that decoding would allocate, without allocating them; a layer that keeps everything
    counts at the longest text.
    """
    kv_bytes = metadata_bytes = 0
    for layer in range(shape.layers):
        mine = policy.for_layer(layer)
        longest = -(-shape.tokens // mine.page_size)
        pages = longest if grows(mine) else min(longest, budget.pages(shape.prompt, mine.page_size))
        none = torch.empty(1, shape.kv_heads, 0, shape.head_dim, dtype=shape.dtype, device="meta")
        keys, values, *others = SlotStore(mine, none, [pages], pages).tensors()
        kv_bytes += keys.nbytes + values.nbytes
        metadata_bytes += sum(tensor.nbytes for tensor in others)
    return kv_bytes, metadata_bytes
