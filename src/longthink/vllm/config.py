"""What ``--additional-config '{"longthink": {...}}'`` may say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from longthink.config import Budget, check_flag, check_int
from longthink.errors import UnsupportedFeatureError
from longthink.policies import PAGE_SIZES, Policy, make_policy

KEY = "longthink"
"""Where the options stand in vLLM's additional configuration."""


@dataclass(frozen=True, kw_only=True)
class PluginOptions:
    """Options of the plugin, checked.

    Parameters
    ----------
    policy
        A policy as everywhere in longthink, such as ``raas`` or ``raas:sharing=layer``. Its page size is vLLM's block
        size and need not be named.
    decode_budget
        Tokens that a request keeps on top of its prompt.
    max_prompt_tokens
        Longest prompt that is accepted: it decides how large a request can become. None: whatever vLLM accepts.
    reserve
        Take all blocks that a request can need when it is admitted, so that it is never preempted.
    tp_sync
        Let all ranks of tensor parallelism evict the same pages where a page table serves a whole layer, as one rank
        alone would.

    Raises
    ------
    ValueError
        If an option is out of range; the message names it, and what is allowed.
    UnsupportedFeatureError
        If the policy cannot work inside vLLM.
    """

    policy: str
    decode_budget: int
    max_prompt_tokens: int | None = None
    reserve: bool = False
    tp_sync: bool = False

    def __post_init__(self) -> None:
        make_policy(self.policy)
        check_int("decode_budget", self.decode_budget, 1)
        if self.max_prompt_tokens is not None:
            check_int("max_prompt_tokens", self.max_prompt_tokens, 1)
        check_flag("reserve", self.reserve)
        check_flag("tp_sync", self.tp_sync)

    @classmethod
    def from_additional_config(cls, additional_config: object) -> Self:
        """Options from vLLM's additional configuration.

        Raises
        ------
        ValueError
            If there are none, one is missing, unknown or out of range.
        """
        values = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        example = f'--additional-config \'{{"{KEY}": {{"policy": "raas", "decode_budget": 1024}}}}\''
        if not isinstance(values, Mapping):
            raise ValueError(f"longthink's backend was chosen without its options: give {example}")
        fields = dataclasses.fields(cls)
        for name in values:
            if name not in {field.name for field in fields}:
                known = ", ".join(field.name for field in fields)
                raise ValueError(f"longthink has no option {name!r} in vLLM: it has {known}")
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ValueError(f"{field.name} is missing: give {example}")
        return cls(**values)

    def to_additional_config(self) -> dict[str, Any]:
        """What to hand to vLLM; options that have their default are left out."""
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return {KEY: given}

    def make_policy(self, block_size: int) -> Policy:
        """Policy whose pages are vLLM's blocks.

        Raises
        ------
        ValueError
            If the block size is none that pages can have, or the policy names another page size.
        UnsupportedFeatureError
            If the policy cannot work inside vLLM.
        """
        if block_size not in PAGE_SIZES:
            sizes = ", ".join(map(str, PAGE_SIZES))
            raise ValueError(f"block_size={block_size} is not one of {sizes}: give --block-size 16")
        policy = make_policy(self.policy)
        check_policy(policy)
        if "page_size=" in self.policy and policy.page_size != block_size:
            raise ValueError(
                f"policy {self.policy!r} names page_size={policy.page_size}, but a page is a block of vLLM: "
                f"give --block-size {policy.page_size}, or no page size"
            )
        return policy.with_options(page_size=block_size)

    @property
    def budget(self) -> Budget:
        """The budget in longthink's terms."""
        return Budget(decode_budget=self.decode_budget)


def check_policy(policy: Policy) -> None:
    """Raise `UnsupportedFeatureError` unless the policy overwrites pages in place and leaves the prompt alone."""
    obstacles = {
        "keeps everything": not policy.needs_budget or policy.grows,
        "may evict the prompt": not policy.pins_prompt,
        "has layers without a bound": policy.for_layer(0) != policy and not policy.for_layer(0).needs_budget,
        "learns from the prompt's attention": policy.uses_prefill_mass,
        "reads only some of its pages": type(policy).select is not Policy.select,
        "learns from weights and from representatives": policy.uses_weights and policy.uses_representatives,
        "turns keys inside the cache": type(policy).key_shift is not Policy.key_shift,
    }
    for obstacle, there in obstacles.items():
        if there:
            raise UnsupportedFeatureError(
                f"policy {policy.spec()!r} {obstacle}, which vLLM's blocks do not allow: "
                "there are raas, milestone, recency, fifo and random"
            )
