"""A prompt to decode, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from longthink.config import brief_repr, check_int
from longthink.hf.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to decode.

    Attributes
    ----------
    key
        Seeds the row's random generator: equal keys with equal prompts give equal samples.
    tokens
        Token ids of the prompt, at least one.
    max_new_tokens
        Tokens after which it is cut off.
    sampling
        How tokens are chosen; greedy unless said.
    tag
        Anything that the caller wants to find in the result.
    """

    key: str
    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    tag: Any = None

    def __post_init__(self) -> None:
        check_int("max_new_tokens", self.max_new_tokens, 1)
        # What is wrong with these would be found in the engine's thread, where it ends the others too.
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling={brief_repr(self.sampling)} must be a longthink.Sampling")
        if not isinstance(self.key, str):
            raise ValueError(f"key={brief_repr(self.key)} must be a text")
        if not self.tokens:
            raise ValueError(f"request {self.key!r} has no prompt tokens: at least one is needed")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What became of a request.

    Attributes
    ----------
    tokens
        New token ids, the end token included.
    finish
        ``stop`` (end token), ``length`` (cut off), ``cancelled``, ``no_room`` (the prompt does not fit in the budget)
        or ``nan`` (the model's numbers broke). `tokens` are those before.
    note
        The reason in words, for ``no_room`` and ``nan``.
    ms_per_token_early, ms_per_token_late
        Mean wall-clock time between two tokens of this row over the first and the last quarter of its tokens
        (milliseconds), the prefills of rows that began meanwhile included; None below 8 tokens.
    seconds
        Wall-clock time from the prompt to the last token.
    rows
        Most rows that decoded side by side meanwhile, this one included.
    kv_bytes_peak
        Largest number of bytes allocated for keys and values, divided by the rows that shared them.
    dense_kv_bytes
        Bytes that keys and values of all tokens of this row would take.
    evicted
        Tokens of this row no longer resident at the end, summed over layers and KV heads.
    """

    request: Request
    tokens: tuple[int, ...]
    finish: str
    note: str | None = None
    ms_per_token_early: float | None = None
    ms_per_token_late: float | None = None
    seconds: float = 0.0
    rows: int = 1
    kv_bytes_peak: int = 0
    dense_kv_bytes: int = 0
    evicted: int = 0
