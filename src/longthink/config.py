"""Argument validation, and the budget of a layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

DEFAULT_POLICY = "recall"
"""Chosen by the measurements in `benchmarks/2026-11-27-real-models.md`."""

KV_DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes for keys and values, if not that of the model."""

PACKED_BITS = (8, 4, 3, 2)
"""Bits of a packed number of keys or values."""

_KV_BITS_FORMS = (
    "give 8, 4, 3 or 2, keys/values such as 4/2, or with options such as 4/2:window=128:prompt=packed"
)


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


@dataclass(frozen=True, kw_only=True)
class KvBits:
    """At how many bits a cache stores the pages that have left its window of recent tokens.

    Parameters
    ----------
    keys, values
        Mean bits of a number of the keys and of the values: 8, 4, 3 or 2.
    window
        Recent tokens in the model's format, a multiple of `page`.
    page
        Tokens in a page, which are packed together: 16 or 32. A channel of its keys has one step and minimum.
    prompt
        ``full``: the prompt's pages stay in the model's format, where the policy never evicts them. ``packed``: only
        the first of them does, and the others are packed as all pages are.
    """

    keys: int
    values: int
    window: int = 64
    page: int = 32
    prompt: str = "full"

    def __post_init__(self) -> None:
        check_choice("kv_bits: keys", self.keys, PACKED_BITS)
        check_choice("kv_bits: values", self.values, PACKED_BITS)
        check_choice("kv_bits: page", self.page, (16, 32))
        check_int("kv_bits: window", self.window, self.page)
        if self.window % self.page:
            raise ValueError(f"kv_bits: window={self.window} must be a multiple of page={self.page}")
        check_choice("kv_bits: prompt", self.prompt, ("full", "packed"))

    def __str__(self) -> str:
        bits = f"{self.keys}" if self.keys == self.values else f"{self.keys}/{self.values}"
        options = {"window": self.window, "page": self.page, "prompt": self.prompt}
        defaults = KvBits(keys=self.keys, values=self.values)
        changed = [f"{name}={x}" for name, x in options.items() if x != getattr(defaults, name)]
        return ":".join([bits, *changed])

    @classmethod
    def parse(cls, value: KvBits | int | str | None) -> KvBits | None:
        """Read ``4``, ``"4/2"`` (keys / values) or ``"4/2:window=128:prompt=packed"``; None is the model's format.

        Raises
        ------
        ValueError
            If it is none of these, or an option is out of range.
        """
        if value is None or isinstance(value, KvBits):
            return value
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(f"kv_bits={brief_repr(value)} is not a number of bits: {_KV_BITS_FORMS}")
        bits, *pairs = str(value).split(":")
        numbers = bits.split("/")
        options: dict[str, Any] = dict(pair.partition("=")[::2] for pair in pairs)
        fits = len(numbers) <= 2 and all(n.isascii() and n.isdigit() for n in numbers)
        if not fits or len(options) < len(pairs) or not options.keys() <= {"window", "page", "prompt"}:
            raise ValueError(f"kv_bits={brief_repr(value)} cannot be read: {_KV_BITS_FORMS}")
        for name in ("window", "page"):
            if name in options:
                text = options[name]
                options[name] = int(text) if text.isascii() and text.isdigit() else text
        return cls(keys=int(numbers[0]), values=int(numbers[-1]), **options)

    @classmethod
    def shortest(cls, value: KvBits | int | str | None) -> str | None:
        """The shortest text for what `parse` reads."""
        found = cls.parse(value)
        return None if found is None else str(found)
