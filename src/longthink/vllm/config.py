"""What ``--additional-config '{"longthink": {...}}'`` may say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from longthink.config import Budget, check_flag, check_int
from longthink.errors import BudgetError, UnsupportedFeatureError
from longthink.policies import (
    PAGE_SIZES,
    Policy,
    RaaS,
    SelectsPages,
    Shape,
    ShiftsKeys,
    grows,
    make_policy,
    page_tables,
    policy_spec,
    with_page_size,
)

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
        BudgetError
            If the decode budget is too small for the policy.
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
        policy = with_page_size(policy, block_size)
        for prompt in range(1, block_size + 1):
            required, cap = policy.required_pages(prompt), self.budget.pages(prompt, block_size)
            if required > cap:
                raise BudgetError(
                    f"decode_budget={self.decode_budget} is too small for policy {self.policy!r}: allowed is >= "
                    f"{self.decode_budget + (required - cap) * block_size}"
                )
        return policy

    @property
    def budget(self) -> Budget:
        """The budget in longthink's terms."""
        return Budget(decode_budget=self.decode_budget)


def check_policy(policy: Policy) -> None:
    """Raise `UnsupportedFeatureError` unless the policy overwrites pages in place and leaves the prompt alone."""
    obstacles = {
        "keeps everything": grows(policy),
        "may evict the prompt": not policy.pins_prompt(),
        "learns from the prompt's attention": "prompt_mass" in policy.needs,
        "reads only some of its pages": isinstance(policy, SelectsPages),
        "learns from weights and from the bounds of keys": {"weights", "key_bounds"} <= policy.needs,
        "turns keys inside the cache": isinstance(policy, ShiftsKeys),
    }
    for obstacle, there in obstacles.items():
        if there:
            raise UnsupportedFeatureError(
                f"policy {policy_spec(policy)!r} {obstacle}, which vLLM's blocks do not allow: "
                "there are raas, milestone, recency, fifo and random"
            )


def layer_policies(policy: Policy, layers: Iterable[int]) -> list[Policy]:
    """Policies of some layers, which all see and keep the same in a block.

    Raises
    ------
    UnsupportedFeatureError
        If one cannot work inside vLLM beside the others.
    """
    found = [policy.for_layer(layer) for layer in layers]
    for mine in found:
        if grows(mine):
            raise UnsupportedFeatureError(
                f"policy {policy_spec(policy)!r} has layers without a bound, which vLLM's blocks do not allow"
            )
        check_policy(mine)
        if _block_layout(mine) != _block_layout(policy):
            raise UnsupportedFeatureError(
                f"policy {policy_spec(policy)!r} has layers that need or keep something else than others, which "
                "vLLM's blocks do not allow"
            )
    return found


def _block_layout(policy: Policy) -> object:
    """What a block of the policy holds."""
    state = policy.init_state(Shape(1, 2, 1, policy.page_size), torch.device("meta"))
    kept = {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
    return policy.page_size, policy.needs, page_tables(policy, 2), kept


def shares_prompt(policy: Policy) -> bool:
    """Whether requests with the same prompt may share its blocks: what is learned of prompt pages must not matter.

    That is known of policies without state, and of RaaS, whose stamps of pinned pages are never looked at.
    """
    stateless = not policy.init_state(Shape(1, 1, 1, policy.page_size), torch.device("meta"))
    return stateless or type(policy) is RaaS
