"""Options of the plugin: ``--additional-config '{"longthink": {...}}'``."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from longthink.config import Budget, brief_repr, check_flag, check_int
from longthink.errors import BudgetError, UnsupportedFeatureError
from longthink.policies import (
    PAGE_SIZES,
    Policy,
    RaaS,
    SelectsPages,
    Shape,
    ShiftsKeys,
    TokenPolicy,
    grows,
    make_policy,
    page_tables,
    policy_spec,
    with_page_size,
)

KEY = "longthink"


@dataclass(frozen=True, kw_only=True)
class PluginOptions:
    """Validated options of the plugin; an option out of range is a `ValueError`."""

    policy: str  # policy spec, such as ``raas`` or ``raas:sharing=layer``
    decode_budget: int  # tokens that a request keeps in each layer on top of its prompt
    max_prompt_tokens: int | None = None  # longest prompt to accept; None for vLLM's own limit
    reserve: bool = False  # allocate all blocks of a request when it is scheduled: no preemption
    tp_sync: bool = False  # have all ranks of tensor parallelism evict the pages that a single rank would

    def __post_init__(self) -> None:
        make_policy(self.policy)
        check_int("decode_budget", self.decode_budget, 1)
        if self.max_prompt_tokens is not None:
            check_int("max_prompt_tokens", self.max_prompt_tokens, 1)
        check_flag("reserve", self.reserve)
        check_flag("tp_sync", self.tp_sync)

    @classmethod
    def from_additional_config(cls, additional_config: object) -> Self:
        values = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        example = f'--additional-config \'{{"{KEY}": {{"policy": "raas", "decode_budget": 1024}}}}\''
        if not isinstance(values, Mapping):
            raise ValueError(f"longthink's backend was selected without its options: give {example}")
        fields = dataclasses.fields(cls)
        for name in values:
            if name not in {field.name for field in fields}:
                known = ", ".join(field.name for field in fields)
                raise ValueError(f"longthink has no option {name!r} in vLLM: allowed are {known}")
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ValueError(f"option {field.name} is missing: give {example}")
        return cls(**values)

    def to_additional_config(self) -> dict[str, Any]:
        """Value for vLLM's ``additional_config``, without options that have their default."""
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return {KEY: given}

    def make_policy(self, block_size: int) -> Policy:
        """Make the policy, with a page size equal to vLLM's block size, and check that the plugin can serve it."""
        if block_size not in PAGE_SIZES:
            sizes = ", ".join(map(str, PAGE_SIZES))
            raise ValueError(f"block_size={block_size} is not one of {sizes}: give --block-size 16")
        policy = make_policy(self.policy)
        check_policy(policy)
        if "page_size=" in self.policy and policy.page_size != block_size:
            raise ValueError(
                f"policy {self.policy!r} has page_size={policy.page_size}, but block_size={block_size}: "
                f"give --block-size {policy.page_size}, or leave page_size out"
            )
        policy = with_page_size(policy, block_size)
        if self.decode_budget < (least := _least_budget(policy)):
            raise BudgetError(
                f"decode_budget={self.decode_budget} is too small for policy {self.policy!r}: allowed is >= {least}"
            )
        return policy

    def request_budgets(self, block_size: int) -> tuple[int, int]:
        """Least and greatest decode budget that a request may ask for."""
        return _least_budget(self.make_policy(block_size)), self.decode_budget

    @property
    def budget(self) -> Budget:
        return Budget(decode_budget=self.decode_budget)


def requested_budget(extra_args: Mapping[str, Any] | None) -> int | None:
    """Decode budget that a request asks for in ``SamplingParams.extra_args``; None if it asks for none.

    The options of a request are a dictionary, ``{"longthink": {"decode_budget": 512}}``. The HTTP API allows no
    dictionaries in its ``vllm_xargs``: there the two names are joined, ``{"longthink.decode_budget": 512}``.
    """
    found: list[tuple[str, Any]] = []
    for key, value in (extra_args or {}).items():
        if key == KEY and not isinstance(value, Mapping):
            raise ValueError(f"{KEY}={brief_repr(value)} must be a dictionary of options: {_REQUEST_EXAMPLE}")
        options = value if key == KEY else {key.removeprefix(f"{KEY}."): value}
        if key == KEY or key.startswith(f"{KEY}."):
            found += options.items()
    for name, _ in found:
        if name != "decode_budget":
            raise ValueError(f"longthink has no option {name!r} for a request: {_REQUEST_EXAMPLE}")
    if len(found) > 1:
        raise ValueError(f"a request gives its decode_budget more than once: {_REQUEST_EXAMPLE}")
    return found[0][1] if found else None


_REQUEST_EXAMPLE = f'give {{"{KEY}": {{"decode_budget": 512}}}} or {{"{KEY}.decode_budget": 512}}'


def _least_budget(policy: Policy) -> int:
    """Smallest decode budget with which a policy works, in tokens, whatever the prompt's length."""
    size = policy.page_size
    pages = max(policy.required_pages(prompt) - 1 for prompt in range(1, size + 1))
    return max((pages - 1) * size + 1, 1)


def check_policy(policy: Policy) -> None:
    """Raise `UnsupportedFeatureError` unless the policy evicts whole pages in place and pins the prompt."""
    reasons = {
        "keeps everything": grows(policy),
        "may evict the prompt": not policy.pins_prompt(),
        "learns from the prompt's attention": "prompt_mass" in policy.needs,
        "learns from the prompt's queries": "query_stats" in policy.needs,
        "reads only some of its pages": isinstance(policy, SelectsPages),
        "needs both weights and key_bounds": {"weights", "key_bounds"} <= policy.needs,
        "shifts keys in the cache": isinstance(policy, ShiftsKeys),
        "ranks single tokens": isinstance(policy, TokenPolicy),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedFeatureError(
                f"policy {policy_spec(policy)!r} {reason}, which vLLM's blocks do not allow: "
                "allowed are raas, milestone, recall, recency, fifo and random"
            )


def layer_policies(policy: Policy, layers: Iterable[int]) -> list[Policy]:
    """Policies of some layers, which must agree in what they store in a block."""
    found = [policy.for_layer(layer) for layer in layers]
    for layer_policy in found:
        if grows(layer_policy):
            raise UnsupportedFeatureError(
                f"policy {policy_spec(policy)!r} has unbounded layers, which vLLM's blocks do not allow"
            )
        check_policy(layer_policy)
        if _block_layout(layer_policy) != _block_layout(policy):
            raise UnsupportedFeatureError(
                f"policy {policy_spec(policy)!r} has layers that differ in needs or state, which vLLM's blocks "
                "do not allow"
            )
    return found


def _block_layout(policy: Policy) -> object:
    state = policy.init_state(Shape(1, 2, 1, policy.page_size), torch.device("meta"))
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
    return policy.page_size, policy.needs, page_tables(policy, 2), layout


def shares_prompt(policy: Policy) -> bool:
    """Whether requests with the same prompt may share its blocks, so that the state of prompt pages must not matter.

    True for policies without state, and for RaaS, which never reads the stamps of pinned pages.
    """
    stateless = not policy.init_state(Shape(1, 1, 1, policy.page_size), torch.device("meta"))
    return stateless or type(policy) is RaaS
