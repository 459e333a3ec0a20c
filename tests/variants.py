"""Subclasses of every built-in policy that override one hook, and a policy that wraps another one."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from longthink.policies import (
    H2O,
    RKV,
    TOVA,
    Dense,
    KeyDiff,
    LazyEviction,
    Milestone,
    Moves,
    Policy,
    Quest,
    RaaS,
    Random,
    Recall,
    Recency,
    SnapKV,
    StreamingLLM,
    TriAttention,
    VaSE,
    page_tables,
)

PAGE = 4
BUILT_IN: dict[str, Policy] = {
    "dense": Dense(page_size=PAGE),
    "h2o": H2O(),
    "h2o pinned": H2O(pin_prompt=True),
    "keydiff": KeyDiff(),
    "lazy_eviction": LazyEviction(alpha=0.05, window=4),
    "milestone": Milestone(page_size=PAGE, young=8, alpha=0.1),
    "recall": Recall(page_size=PAGE, young=8, alpha=0.1, memory=20),
    "quest": Quest(page_size=PAGE),
    "r_kv": RKV(window=4),
    "raas": RaaS(page_size=PAGE),
    "raas exact": RaaS(page_size=PAGE, score="exact", used="alpha", alpha=0.05),
    "raas layer": RaaS(page_size=PAGE, sharing="layer"),
    "random": Random(page_size=PAGE),
    "recency": Recency(page_size=PAGE),
    "snapkv": SnapKV(window=4),
    "snapkv unpinned": SnapKV(window=4, pooling="max", pin_prompt=False),
    "streaming_llm": StreamingLLM(),
    "tova": TOVA(),
    "tri_attention": TriAttention(window=4),
    "vase": VaSE(window=4),
}


def _more_pages(policy: Policy, table: Any) -> torch.Tensor:
    """More protected pages: four tokens, from the fifth page behind the prompt on."""
    fifth_B11 = ((table.prompt_B + policy.page_size - 1) // policy.page_size + 4)[:, None, None]
    return (table.page_BKP >= fifth_B11) & (table.page_BKP < fifth_B11 + 4 // policy.page_size)


HOOKS: dict[str, Callable[[type[Policy]], Any]] = {
    "needs": lambda base: property(lambda self: super(type(self), self).needs | {"vectors"}),
    "pins_prompt": lambda base: lambda self: base.pins_prompt(self),
    "for_layer": lambda base: (
        lambda self, layer: Recency(page_size=self.page_size) if layer == 1 else base.for_layer(self, layer)
    ),
    "required_pages": lambda base: lambda self, prompt: base.required_pages(self, prompt) + 1,
    "init_state": lambda base: (
        lambda self, shape, device: (
            base.init_state(self, shape, device)
            | {"more": torch.zeros(shape.B, shape.K, shape.P, device=device)}
        )
    ),
    "admit": lambda base: lambda self, table, mass: [x.add_(1) for x in table.state.values()] and None,
    "protected": lambda base: lambda self, table: base.protected(self, table) | _more_pages(self, table),
    "worth": lambda base: lambda self, table: -table.page_BKP,
    "observe": lambda base: lambda self, table, step: [x.add_(1) for x in table.state.values()] and None,
    "trim": lambda base: (
        lambda self, position, length, cap, mass: (
            (position >= (length - cap * self.page_size // 2)[:, None]) & (position >= 0)
        )[:, None]
    ),
    "moves": lambda base: lambda self, table, slot, full: Moves(slot[..., None], slot[..., None]),
    "select": lambda base: (
        lambda self, table, query: (table.now_B // self.page_size)[:, None, None].expand(
            -1, query.shape[1], -1
        )
    ),
    "shifted_tokens": lambda base: lambda self: 2,
    "shift_keys": lambda base: lambda self, table, keys, frequencies: keys * 0.5,
    "tables": lambda base: lambda self, kv_heads: page_tables(base(), kv_heads),
}
"""What overrides each hook, by the class that it overrides it of: something that shows, where anything can show."""


def override(policy: Policy, hook: str) -> Policy:
    """The policy with one hook overridden, of a class of its own."""
    base = type(policy)
    cls = dataclass(frozen=True, kw_only=True)(type(f"My{base.__name__}", (base,), {hook: HOOKS[hook](base)}))
    return cls(**{field.name: getattr(policy, field.name) for field in fields(policy)})


def subclasses() -> Iterator[tuple[str, Policy]]:
    """Every built-in policy with every hook that it has overridden, one at a time."""
    for name, policy in BUILT_IN.items():
        for hook in HOOKS:
            senseless = (hook == "trim" and policy.pins_prompt()) or (name, hook) == ("dense", "for_layer")
            if hasattr(type(policy), hook) and not senseless:
                yield f"{name}: {hook}", override(policy, hook)


def keep_first() -> type[Policy]:
    """The wrapping policy of the documents."""
    page = Path(__file__).parents[1] / "docs" / "write-your-own-policy.md"
    (code,) = re.findall(r"```python title=keep_first\.py\n(.*?)```", page.read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    return found["KeepFirst"]


def wrappers() -> Iterator[tuple[str, Policy]]:
    """That policy around every built-in one that it can wrap."""
    cls = keep_first()
    for name, policy in BUILT_IN.items():
        if policy.bounds == "memory" and policy.pins_prompt():
            yield f"keep_first: {name}", cls(steps=6, page_size=policy.page_size, then=replace(policy))
