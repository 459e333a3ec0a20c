"""The registry of policies: built-in ones, and those of other packages (entry point `longthink.policies`).

The spec of a policy is its name and options, ``raas:r=0.25:score=exact``. An option that is itself a policy is put in
parentheses: ``keep_first:steps=64:then=(raas:r=0.25)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_type_hints

from longthink.config import Budget, brief_repr
from longthink.errors import BudgetError, UnknownPolicyError
from longthink.policies.base import Policy, SharesTable, needs_budget

ENTRY_POINTS = "longthink.policies"
ALIASES = {"fifo": ("recency", {"page_size": "16"})}
"""Short names for a policy with some options set."""
_REGISTRY: dict[str, type[Policy]] = {}
_P = TypeVar("_P", bound=type[Policy])


def register(name: str) -> Callable[[_P], _P]:
    """Class decorator: register a policy under a name.

    Raises
    ------
    ValueError
        If another class has the name.
    """

    def add(cls: _P) -> _P:
        known = _REGISTRY.setdefault(name, cls)
        if known is not cls and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"policy name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        _REGISTRY[name] = cls
        cls.name = name
        return cls

    return add


def available_policies() -> tuple[str, ...]:
    """Names of all policies, the built-in ones first."""
    found = {entry.name for entry in entry_points(group=ENTRY_POINTS)} - _REGISTRY.keys()
    return (*_REGISTRY, *sorted(found))


def get_policy_class(name: str) -> type[Policy]:
    """Class of a policy.

    Raises
    ------
    UnknownPolicyError
        If there is no such policy, or its entry point is not a subclass of `Policy`.
    """
    if name not in _REGISTRY:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            cls = entry.load()
            if not (isinstance(cls, type) and issubclass(cls, Policy)):
                raise UnknownPolicyError(
                    f"entry point {entry.value!r} of policy {name!r} is not a subclass of Policy"
                )
            register(name)(cls)
    if name not in _REGISTRY:
        raise UnknownPolicyError(f"unknown policy {name!r}: available are {', '.join(available_policies())}")
    return _REGISTRY[name]


def make_policy(spec: str | Policy) -> Policy:
    """Policy from a spec such as ``raas:r=0.25:score=exact``; a `Policy` is returned as it is.

    Raises
    ------
    UnknownPolicyError
        If there is no such policy.
    ValueError
        If an option is unknown or out of range.
    """
    if isinstance(spec, Policy):
        return spec
    if not isinstance(spec, str):
        raise ValueError(f"policy={brief_repr(spec)} must be a name such as 'raas' or a Policy object")
    name, *parts = _split(spec)
    options = {}
    for part in parts:
        field, separator, text = part.partition("=")
        if not separator:
            raise ValueError(f"policy option {part!r} of {spec!r} must read field=value")
        if field in options:
            raise ValueError(f"policy option {field!r} of {spec!r} is given twice")
        options[field] = text
    if name in ALIASES:
        name, defaults = ALIASES[name]
        options = defaults | options
    cls = get_policy_class(name)
    _check_fields(cls, options)
    types = get_type_hints(cls)
    return cls(**{field: _parse(field, text, types[field]) for field, text in options.items()})


def policy_spec(policy: Policy) -> str:
    """Shortest spec that `make_policy` turns into this policy, such as ``raas:r=0.25``."""
    changed = [
        f"{f.name}=({policy_spec(value)})" if isinstance(value, Policy) else f"{f.name}={value}"
        for f in dataclasses.fields(policy)
        if (value := getattr(policy, f.name)) != f.default
    ]
    return ":".join([policy.name, *changed])


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """Name and all options as JSON values."""
    options = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    return {"name": policy.name} | {
        field: policy_to_dict(value) if isinstance(value, Policy) else value
        for field, value in options.items()
    }


def policy_from_dict(values: dict[str, Any]) -> Policy:
    """Inverse of `policy_to_dict`."""
    options: dict[str, Any] = {
        field: policy_from_dict(value) if isinstance(value, dict) else value
        for field, value in values.items()
    }
    name: str = options.pop("name", "")
    if name in ALIASES:  # results stored while it was a policy of its own
        name = ALIASES[name][0]
    cls = get_policy_class(name)
    _check_fields(cls, options)
    return cls(**options)


def policy_budget(
    policy: Policy, budget: int | None = None, decode_budget: int | None = None
) -> Budget | None:
    """Budget for a policy; None where it keeps everything.

    Raises
    ------
    BudgetError
        If the policy needs a budget and there is none, or the reverse.
    ValueError
        If both are given, or one is out of range.
    """
    given = budget is not None or decode_budget is not None
    if given and not needs_budget(policy):
        raise BudgetError(f"policy {policy.name!r} keeps everything: give neither budget nor decode_budget")
    if not given and needs_budget(policy):
        raise BudgetError(f"policy {policy.name!r} needs a budget: give budget=... or decode_budget=...")
    return Budget(budget=budget, decode_budget=decode_budget) if given else None


def with_page_size(policy: Policy, page_size: int) -> Policy:
    """Copy of the policy, and of any that it wraps, with another page size.

    Raises
    ------
    ValueError
        If one of them does not support the page size.
    """
    wrapped = {
        f.name: with_page_size(value, page_size)
        for f in dataclasses.fields(policy)
        if isinstance(value := getattr(policy, f.name), Policy)
    }
    return dataclasses.replace(policy, page_size=page_size, **wrapped)


def page_tables(policy: Policy, kv_heads: int) -> int:
    """Number of page tables of a layer: one per KV head, or 1."""
    return policy.tables(kv_heads) if isinstance(policy, SharesTable) else kv_heads


def _split(spec: str) -> list[str]:
    """Split a spec at colons outside parentheses."""
    parts, depth = [""], 0
    for letter in spec:
        depth += (letter == "(") - (letter == ")")
        if letter == ":" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _check_fields(cls: type[Policy], options: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for field in options:
        if field not in known:
            raise ValueError(
                f"policy {cls.name!r} has no option {field!r}: it has {', '.join(known) or 'none'}"
            )


def _parse(field: str, text: str, kind: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, Policy):
        return make_policy(text.removeprefix("(").removesuffix(")"))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{field}={text!r} must be true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            name = "an integer" if kind is int else "a number"
            raise ValueError(f"{field}={text!r} must be {name}") from None
    return text
