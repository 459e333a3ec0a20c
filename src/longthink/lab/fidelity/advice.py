"""Advice: the policies and the smallest budgets under which a model predicts nearly as with a dense cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longthink.cache.store import SlotStore
from longthink.config import Budget, check_range
from longthink.lab.fidelity.summary import Summary
from longthink.policies import Policy, grows, make_policy


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


def shape_of(model: Any, lengths: Sequence[tuple[int, int]]) -> Shape:
    """Shape of a model, which may be without its weights, and of texts of these prompt and decoded tokens."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers, kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads, dtype=model.dtype,
        weights=sum(parameter.nbytes for parameter in model.parameters()),
        prompt=round(sum(prompt for prompt, _ in lengths) / len(lengths)), tokens=max(map(sum, lengths)),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A policy at a budget, and its cost: bytes of one request, and requests that fit in memory at a time."""

    row: Summary  # how near its predictions are
    kv_bytes: int
    metadata_bytes: int  # positions, stamps, bounds
    dense_kv_bytes: int  # everything kept, at the longest text
    requests: int
    dense_requests: int

    @property
    def bytes(self) -> int:
        return self.kv_bytes + self.metadata_bytes


def advise(rows: Sequence[Summary], shape: Shape, *, kl: float, memory: int) -> list[Advice]:
    """Return what is at most `kl` nats per token from dense on all sources of text, by memory, then by KL.

    Policies that grow with the text are left out, and so are budgets at which nothing was scored: no text is longer,
    or none has room. `memory` bytes hold the weights and the caches.
    """
    check_range("kl", kl, 0.0)
    check_range("memory", memory, 0)
    dense = shape.kv_bytes(shape.tokens)
    room = max(0, memory - shape.weights)
    cells: dict[tuple[str, int | None, int | None], list[Summary]] = {}
    for row in rows:
        cells.setdefault((row.policy, row.budget, row.decode_budget), []).append(row)
    found = []
    for (spec, total, behind), sources in cells.items():
        policy, worst = (
            make_policy(spec),
            max(sources, key=lambda row: row.kl.mean if row.kl else float("inf")),
        )
        if grows(policy) or worst.kl is None or worst.kl.mean > kl:
            continue
        kv_bytes, metadata_bytes = request_bytes(policy, Budget(budget=total, decode_budget=behind), shape)
        found.append(
            Advice(
                row=worst, kv_bytes=kv_bytes, metadata_bytes=metadata_bytes, dense_kv_bytes=dense,
                requests=room // (kv_bytes + metadata_bytes), dense_requests=room // dense,
            )
        )  # fmt: skip
    return sorted(found, key=lambda one: (one.bytes, one.row.kl.mean if one.row.kl else 0.0))


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
