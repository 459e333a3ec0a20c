"""Advice: the policies and smallest budgets that keep what a model reads within a given loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longthink.cache.store import SlotStore
from longthink.config import Budget, check_choice, check_range
from longthink.lab.analyze.replays import CLAIRVOYANT, Mean
from longthink.lab.analyze.store import Header
from longthink.policies import Policy, grows, make_policy

MEASURES = ("lookups", "recall")


@dataclass(frozen=True, kw_only=True)
class Shape:
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    weights: int  # bytes
    prompt: int  # tokens, mean
    tokens: int  # of the longest text, prompt included

    def kv_bytes(self, tokens: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize * tokens


def shape_of(model: Any, headers: Sequence[Header]) -> Shape:
    return Shape(
        layers=headers[0].layers, kv_heads=headers[0].kv_heads, head_dim=headers[0].head_dim,
        dtype=model.dtype, weights=sum(parameter.nbytes for parameter in model.parameters()),
        prompt=round(sum(header.prompt_tokens for header in headers) / len(headers)),
        tokens=max(len(header.token_ids) for header in headers),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A policy at a budget, and its cost: bytes of one request, and requests that fit in memory at a time."""

    row: Mean  # means of its replays
    kept: float  # the measure among them that was asked for
    kv_bytes: int
    metadata_bytes: int  # positions, stamps, bounds
    dense_kv_bytes: int  # everything kept, at the longest text
    requests: int
    dense_requests: int

    @property
    def bytes(self) -> int:
        return self.kv_bytes + self.metadata_bytes


def advise(
    rows: Sequence[Mean], shape: Shape, *, loss: float = 0.02, measure: str = "lookups", memory: int
) -> list[Advice]:
    """Return what loses at most a share `loss` of a measure in `memory` bytes, by memory, then by what is kept.

    Policies that grow with the text or know the future are left out, and so are budgets with no room for some prompt.
    """
    check_range("loss", loss, 0.0, 1.0)
    check_choice("measure", measure, MEASURES)
    check_range("memory", memory, 0)
    dense = shape.kv_bytes(shape.tokens)
    room = max(0, memory - shape.weights)
    found = []
    for row in rows:
        kept = getattr(row, measure)
        if row.policy in CLAIRVOYANT or kept is None or row.no_room or kept < 1 - loss:
            continue
        if grows(policy := make_policy(row.policy)):
            continue
        budget = Budget(budget=row.budget, decode_budget=row.decode_budget)
        kv_bytes, metadata_bytes = request_bytes(policy, budget, shape)
        found.append(
            Advice(
                row=row, kept=kept, kv_bytes=kv_bytes, metadata_bytes=metadata_bytes, dense_kv_bytes=dense,
                requests=room // (kv_bytes + metadata_bytes), dense_requests=room // dense,
            )
        )  # fmt: skip
    return sorted(found, key=lambda one: (one.bytes, -one.kept))


def request_bytes(policy: Policy, budget: Budget, shape: Shape) -> tuple[int, int]:
    """Return the bytes of one request's keys and values, and of the rest of its cache, as decoding allocates it."""
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
