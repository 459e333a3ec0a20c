"""Argument validation, and the budget of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

DEFAULT_POLICY = "recall"
"""Chosen by the measurements in `benchmarks/2026-11-27-real-models.md`."""

KV_DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes for keys and values, if not that of the model."""


def brief_repr(value: Any) -> str:
    """``repr`` of a value for a message, or its type if that is long."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"<{type(value).__name__}>"


def check_range(field: str, value: float, low: float, high: float | None = None) -> None:
    """Raise `ValueError` unless ``low <= value <= high``; the message names field, value and range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low:
        raise ValueError(f"{field}={brief_repr(value)} is out of range: allowed is {_range(low, high)}")
    if high is not None and not value <= high:
        raise ValueError(f"{field}={brief_repr(value)} is out of range: allowed is {_range(low, high)}")


def check_int(field: str, value: int, low: int, high: int | None = None) -> None:
    """Raise `ValueError` unless the value is an integer in the range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{field}={brief_repr(value)} must be an integer: allowed is {_range(low, high)}")
    check_range(field, value, low, high)


def check_choice(field: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise `ValueError` unless the value is one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{field}={brief_repr(value)} is not one of {', '.join(map(repr, choices))}")


def check_flag(field: str, value: bool) -> None:
    """Raise `ValueError` unless the value is True or False."""
    check_choice(field, value if isinstance(value, bool) else brief_repr(value), (True, False))


def check_path(field: str, value: str) -> None:
    """Raise `ValueError` unless the value is a path that a policy's spec can hold: colons separate its options."""
    if not isinstance(value, str) or not value or set(":()") & set(value):
        raise ValueError(f"{field}={brief_repr(value)} must be a path without colons and parentheses")


def check_sampling(temperature: float, top_p: float | None, top_k: int | None) -> None:
    """Raise `ValueError` unless these are valid together; temperature 0 is greedy."""
    check_range("temperature", temperature, 0.0)
    if top_p is not None:
        check_range("top_p", top_p, 0.0, 1.0)
    if top_k is not None:
        check_int("top_k", top_k, 1)
    if temperature == 0 and (top_p is not None or top_k is not None):
        raise ValueError("top_p and top_k need sampling: give a temperature above 0")


def _range(low: float, high: float | None) -> str:
    return f">= {low}" if high is None else f"{low} to {high}"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Tokens that a layer keeps per row. Exactly one of the two fields must be given.

    Parameters
    ----------
    budget
        Tokens kept in total, prompt included.
    decode_budget
        Tokens kept on top of the prompt.

    Raises
    ------
    ValueError
        If neither or both are given, or a value is below 1.
    """

    budget: int | None = None
    decode_budget: int | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.decode_budget is None):
            raise ValueError(
                f"give exactly one of budget (prompt included) and decode_budget (on top of the prompt), "
                f"got budget={self.budget!r} and decode_budget={self.decode_budget!r}"
            )
        for field in ("budget", "decode_budget"):
            if getattr(self, field) is not None:
                check_int(field, getattr(self, field), 1)

    def pages(self, prompt: int, page_size: int) -> int:
        """Page slots of a row with this many prompt tokens."""
        if self.budget is not None:
            return self.budget // page_size
        assert self.decode_budget is not None
        return -(-prompt // page_size) + -(-self.decode_budget // page_size)

    def __str__(self) -> str:
        if self.budget is not None:
            return f"budget={self.budget}"
        return f"decode_budget={self.decode_budget}"
