"""`Request` and `Finished`, what goes into the engine and what comes out, and `Job`, a request in between."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from longthink.config import brief_repr, check_int
from longthink.hf.cache import PagedCache
from longthink.hf.sampling import Sampling, generator_for


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to decode.

    Attributes
    ----------
    key
        Seeds the request's random generator: equal keys with equal prompts give equal samples.
    tokens
        Token ids of the prompt, at least one.
    max_new_tokens
        Largest number of tokens to generate, at least 1.
    sampling
        How tokens are sampled; greedy by default.
    tag
        Any object, returned with the result.
    keep_cache
        Whether the result holds a copy of the request's cache, so that the conversation can go on.
    after
        Result of an earlier request that kept its cache: `tokens` are the next turn behind its text.
    """

    key: str
    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    tag: Any = None
    keep_cache: bool = False
    after: Finished | None = None

    def __post_init__(self) -> None:
        check_int("max_new_tokens", self.max_new_tokens, 1)
        # In the engine's thread such an error would end the other requests too.
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling={brief_repr(self.sampling)} must be a longthink.Sampling")
        if not isinstance(self.key, str):
            raise ValueError(f"key={brief_repr(self.key)} must be a string")
        if not self.tokens:
            raise ValueError(f"request {self.key!r} has no prompt tokens: at least one is needed")
        if self.after is not None and (not isinstance(self.after, Finished) or self.after.cache is None):
            raise ValueError(
                f"after={brief_repr(self.after)} must be the result of a request that was submitted with "
                "keep_cache=True and has a token"
            )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Result of a request.

    Attributes
    ----------
    tokens
        New token ids, including the end token.
    finish
        ``stop`` (end token), ``length`` (token limit), ``cancelled``, ``no_room`` (the prompt does not fit in the
        budget) or ``nan`` (the model produced NaN). `tokens` are those before.
    note
        Error message, for ``no_room`` and ``nan``.
    ms_per_token_early, ms_per_token_late
        Mean milliseconds of wall-clock time per token over the first and the last quarter of the tokens, including
        prefills of other requests in between; None below 8 tokens.
    seconds
        Wall-clock time from the start of the prefill to the last token.
    rows
        Largest number of requests in the batch while this one ran, itself included.
    kv_bytes_peak
        Largest number of bytes allocated for keys and values, divided by the rows that shared them.
    dense_kv_bytes
        Bytes that a dense cache would take for all tokens of this request.
    evicted
        Tokens of this request evicted by its end, summed over layers and KV heads.
    cache
        With ``keep_cache``, the cache of the request alone, closed. It holds all tokens but the last, and its memory
        is held as long as it is referenced.
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
    cache: PagedCache | None = field(default=None, repr=False, compare=False)


@dataclass(eq=False)
class Job:
    """A submitted request, its tokens so far and its result; any thread may wait for them."""

    request: Request
    generator: torch.Generator = field(init=False)
    started: float = 0.0
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    rows: int = 1
    kv_bytes_peak: int = 0
    nan: bool = False
    finished: Finished | None = None
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.generator = generator_for(self.request.key)
        self._changed = threading.Condition()

    @property
    def done(self) -> bool:
        return self.finished is not None or self.error is not None

    def finish_reason(self, end_tokens: frozenset[int]) -> str | None:
        """`Finished.finish`, or None while there is more to decode."""
        if self.nan:
            return "nan"
        if self.tokens[-1] in end_tokens:
            return "stop"
        return "length" if len(self.tokens) >= self.request.max_new_tokens else None

    def notify(self) -> None:
        """Wake threads that wait for tokens."""
        with self._changed:
            self._changed.notify_all()

    def end(self, finished: Finished | None, error: BaseException | None = None) -> None:
        """Set the outcome; later calls change nothing."""
        with self._changed:
            if not self.done:
                self.finished, self.error = finished, error
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done, for `timeout` seconds at most, and return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout)

    def stream(self) -> Iterator[int]:
        """Yield every token as it is decoded."""
        count = 0
        while True:
            with self._changed:
                while not self.done and len(self.tokens) == count:
                    self._changed.wait()
                new, done = self.tokens[count:], self.done
            yield from new
            count += len(new)
            if done:
                return
