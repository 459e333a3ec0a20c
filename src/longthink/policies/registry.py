"""Which policies there are: the built-in ones and those of other packages (entry point `longthink.policies`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_type_hints

from longthink.errors import UnknownPolicyError
from longthink.policies.base import Policy

ENTRY_POINTS = "longthink.policies"
_REGISTRY: dict[str, type[Policy]] = {}
_P = TypeVar("_P", bound=type[Policy])


def register(name: str) -> Callable[[_P], _P]:
    """Class decorator: make a policy known under a name.

    Raises
    ------
    ValueError
        If another class has the name already.
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
        If there is none of that name, or an entry point does not lead to a policy.
    """
    if name not in _REGISTRY:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            cls = entry.load()
            if not (isinstance(cls, type) and issubclass(cls, Policy)):
                raise UnknownPolicyError(
                    f"entry point {entry.value!r} of policy {name!r} is no subclass of Policy"
                )
            register(name)(cls)
    if name not in _REGISTRY:
        raise UnknownPolicyError(f"unknown policy {name!r}: there are {', '.join(available_policies())}")
    return _REGISTRY[name]


def make_policy(spec: str | Policy) -> Policy:
    """Policy from a text such as ``raas`` or ``raas:r=0.25:score=exact``; a policy is passed through.

    Raises
    ------
    UnknownPolicyError
        If there is no policy of that name.
    ValueError
        If an option is unknown or out of range.
    """
    if isinstance(spec, Policy):
        return spec
    if not isinstance(spec, str):
        raise ValueError(f"policy={spec!r} must be a name such as 'raas' or a Policy object")
    name, *parts = spec.split(":")
    options = {}
    for part in parts:
        field, separator, text = part.partition("=")
        if not separator:
            raise ValueError(f"policy option {part!r} of {spec!r} must read field=value")
        options[field] = text
    cls = get_policy_class(name)
    _check_fields(cls, options)
    types = get_type_hints(cls)
    return cls(**{field: _parse(field, text, types[field]) for field, text in options.items()})


def policy_from_dict(values: dict[str, Any]) -> Policy:
    """Policy from what `Policy.to_dict` returned."""
    options = dict(values)
    cls = get_policy_class(options.pop("name", ""))
    _check_fields(cls, options)
    return cls(**options)


def _check_fields(cls: type[Policy], options: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for field in options:
        if field not in known:
            raise ValueError(
                f"policy {cls.name!r} has no option {field!r}: it has {', '.join(known) or 'none'}"
            )


def _parse(field: str, text: str, kind: Any) -> Any:
    """Value of an option from its text, by the type of its dataclass field."""
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
