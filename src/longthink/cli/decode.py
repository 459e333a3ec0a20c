"""One generation with streamed text, the time of every token, and a clean end on Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from longthink.hf import PagedCache


@dataclass
class Decoded:
    """Output of a generation so far; complete once :func:`decode` returns."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""  # without special tokens
    step_s: list[float] = field(default_factory=list)  # seconds per new token; the first includes the prefill
    stopped: str = "end"  # ``end`` (end token), ``length`` (token limit) or ``interrupted``

    @property
    def prompt_s(self) -> float:
        return self.step_s[0] if self.step_s else 0.0

    @property
    def decode_s(self) -> float:
        return sum(self.step_s[1:])

    @property
    def tokens_per_s(self) -> float:
        return (len(self.step_s) - 1) / self.decode_s if self.decode_s > 0 else 0.0

    def ms_per_token(self, part: slice) -> float:
        """Mean over a part of the tokens after the first (NaN if empty)."""
        times = self.step_s[1:][part]
        return 1000 * sum(times) / len(times) if times else float("nan")


class Detokenizer:
    """Turns token ids into text one by one, in constant time each.

    A token's text can depend on its neighbours (a leading space, half a character), so each is decoded together with
    the few before it, and text is held back while it ends in an incomplete character.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._shown = 0

    def add(self, token: int) -> str:
        """The text completed by ``token``; empty while a character is incomplete."""
        self._ids.append(token)
        known, text = self._texts()
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(known):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(known) :]

    def rest(self) -> str:
        known, text = self._texts()
        self._start = self._shown = len(self._ids)
        return text[len(known) :]

    def _texts(self) -> tuple[str, str]:
        """Text of the recent tokens that were shown, and of all recent tokens."""
        known = self._tokenizer.decode(self._ids[self._start : self._shown], skip_special_tokens=True)
        text = self._tokenizer.decode(self._ids[self._start :], skip_special_tokens=True)
        return known, text


class _Listener:
    """Streamer for ``model.generate``, which passes the prompt first and then every token."""

    def __init__(
        self, decoded: Decoded, tokenizer: Any, on_text: Callable[[str], None], on_step: Callable[[int], None]
    ) -> None:
        self._decoded = decoded
        self._detokenizer = Detokenizer(tokenizer)
        self._on_text, self._on_step = on_text, on_step
        self._prompt_seen = False
        self._clock = time.perf_counter()

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            self._clock = time.perf_counter()
            return
        self._decoded.step_s.append(time.perf_counter() - self._clock)
        token = int(value.reshape(-1)[0])
        self._decoded.tokens.append(token)
        self._emit(self._detokenizer.add(token))
        self._on_step(len(self._decoded.tokens))
        # Time spent here belongs to the display, not to the model.
        self._clock = time.perf_counter()

    def end(self) -> None:
        self._emit(self._detokenizer.rest())

    def _emit(self, text: str) -> None:
        if text:
            self._decoded.text += text
            self._on_text(text)


def decode(
    model: Any, tokenizer: Any, inputs: dict[str, Tensor], cache: PagedCache, *,
    on_text: Callable[[str], None] = lambda text: None, on_step: Callable[[int], None] = lambda count: None,
    interrupted: Callable[[], bool] = lambda: False, **generate_kwargs: Any,
) -> Decoded:  # fmt: skip
    """Generate one text with a cache; ``generate_kwargs`` must include ``max_new_tokens``.

    After each token ``on_step`` gets the number of tokens so far; its time is not counted as the model's. Then
    ``interrupted`` is called; True ends the generation.
    """
    from longthink.hf import generate

    decoded = Decoded()
    end_ids = model.generation_config.eos_token_id
    ends = {end_ids} if isinstance(end_ids, int) else set(end_ids or ())

    def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids.new_full((len(input_ids),), interrupted()).bool()

    generate(
        model, inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device),
        past_key_values=cache, streamer=_Listener(decoded, tokenizer, on_text, on_step),
        stopping_criteria=[stop], **generate_kwargs,
    )  # fmt: skip
    if not decoded.tokens or decoded.tokens[-1] not in ends:
        decoded.stopped = "interrupted" if interrupted() else "length"
    return decoded


@contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C in the ``with`` block set a flag, so that the current token is completed.

    Yields a function that returns the flag. A second Ctrl-C raises ``KeyboardInterrupt`` as usual.
    """
    pressed = threading.Event()

    def handler(number: int, frame: object) -> None:
        del number, frame
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread can set signal handlers, and only it receives Ctrl-C.
        yield pressed.is_set
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
