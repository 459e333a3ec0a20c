"""`decode_stream`: many prompts through one bounded cache, a finished row giving its place to the next prompt."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longthink.config import DEFAULT_POLICY, Budget, check_int
from longthink.errors import BudgetError
from longthink.hf.cache import PagedCache, make_cache
from longthink.hf.sampling import Sampling, generator_for
from longthink.policies import Policy

_GREEDY = Sampling()
_FEWEST_TIMED = 8
"""Tokens below which a row's quarters are too short to be timed."""


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
    tag
        Anything that the caller wants to find in the result.
    """

    key: str
    tokens: tuple[int, ...]
    max_new_tokens: int
    tag: Any = None

    def __post_init__(self) -> None:
        check_int("max_new_tokens", self.max_new_tokens, 1)
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
        ``stop`` (end token), ``length`` (cut off), ``no_room`` (the prompt does not fit in the budget) or ``nan``
        (the model's numbers broke; `tokens` are those before).
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


@dataclass
class _Row:
    """A request that is being decoded."""

    request: Request
    generator: torch.Generator
    started: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    rows: int = 1
    kv_bytes_peak: int = 0
    nan: bool = False

    def finish(self, ends: frozenset[int]) -> str | None:
        """Say why the row is complete, or None while it is not."""
        if self.nan:
            return "nan"
        if self.tokens[-1] in ends:
            return "stop"
        return "length" if len(self.tokens) >= self.request.max_new_tokens else None


def decode_stream(
    model: PreTrainedModel,
    prompts: Iterable[Request],
    *,
    policy: str | Policy = DEFAULT_POLICY,
    budget: Budget | None = None,
    rows: int = 16,
    sampling: Sampling = _GREEDY,
) -> Iterator[Finished]:
    """Decode prompts side by side and yield each as soon as it is complete.

    Every row counts its own positions and has its own budget. When one is complete, the next prompt is read alone
    and takes its place at once; when there is none left, the batch shrinks. Only the model's end tokens (from its
    generation config) end a row: penalties and other settings of that config are not applied.

    What a row gives does not depend on its neighbours but through the rounding of batched arithmetic: in float32 the
    tokens are those of `generate`, in narrower formats two nearly equal logits may change places.

    Parameters
    ----------
    model
        A decoder-only transformers model with full attention.
    prompts
        Requests, taken one by one when there is room.
    policy, budget
        What to keep, and how much; None for a policy that needs none.
    rows
        Rows decoded side by side at most.
    sampling
        How tokens are chosen.

    Raises
    ------
    BudgetError
        If the budget does not suit the policy. A prompt that does not fit is no error: see `Finished`.
    UnsupportedModelError
        If the model would be served wrongly.
    ValueError
        If an argument is out of range.
    """
    check_int("rows", rows, 1)
    given: dict[str, Any] = (
        {} if budget is None else {"budget": budget.budget, "decode_budget": budget.decode_budget}
    )
    # Made once to be refused early; it also keeps the model attending through longthink until the end.
    first = make_cache(model, policy=policy, **given)
    return _Stream(model, first, iter(prompts), rows, sampling).run()


class _Stream:
    """The rows that are being decoded, and the cache that they share."""

    def __init__(
        self,
        model: PreTrainedModel,
        spare: PagedCache,
        prompts: Iterator[Request],
        rows: int,
        sampling: Sampling,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.places = rows
        self.sampling = sampling
        self.spare = spare
        self.cache: PagedCache | None = None
        self.rows: list[_Row] = []
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or [])

    def run(self) -> Iterator[Finished]:
        try:
            while True:
                while len(self.rows) < self.places:
                    started = yield from self._start(len(self.rows))
                    if not started:
                        break
                if not self.rows:
                    return
                self._step()
                yield from self._replace_finished()
        finally:
            self._drop_cache()
            self.spare.close()

    def _drop_cache(self) -> None:
        if self.cache is not None:
            self.cache.close()
        self.cache = None

    def _replace_finished(self) -> Iterator[Finished]:
        """Report complete rows; the next prompts take their places, and what stays empty goes."""
        empty = []
        for place, row in enumerate(self.rows):
            finish = row.finish(self.ends)
            if finish is not None:
                assert self.cache is not None
                yield self._report(row, finish, self.cache, place)
                started = yield from self._start(place)
                if not started:
                    empty.append(place)
        if empty:
            kept = [place for place in range(len(self.rows)) if place not in empty]
            self.rows = [self.rows[place] for place in kept]
            if kept and self.cache is not None:
                self.cache.keep_rows(kept)
            else:
                self._drop_cache()

    def _start(self, place: int) -> Generator[Finished, None, bool]:
        """Read prompts until one is to be decoded, put it into a place, and return whether there was one."""
        for request in self.prompts:
            row = _Row(request, generator_for(request.key), time.perf_counter())
            cache = PagedCache(self.model, self.spare.policy, self.spare.budget)
            try:
                self._prefill(row, cache)
                finish = row.finish(self.ends)
                if finish is not None:
                    yield self._report(row, finish, cache, 0)
                    continue
                if self.cache is None:
                    self.cache = cache
                else:
                    self.cache.adopt(place, cache)
            except BudgetError as error:
                yield Finished(request=request, tokens=(), finish="no_room", note=str(error))
                continue
            finally:
                if cache is not self.cache:
                    cache.close()
            self.rows[place : place + 1] = [row]
            return True
        return False

    @torch.no_grad()
    def _prefill(self, row: _Row, cache: PagedCache) -> None:
        ids = torch.tensor([row.request.tokens], device=self.model.device)
        logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        row.kv_bytes_peak = cache.kv_bytes
        self._take(logits, [row])

    @torch.no_grad()
    def _step(self) -> None:
        """One token for every row."""
        cache = self.cache
        assert cache is not None
        device = self.model.device
        last = torch.tensor([row.tokens[-1:] for row in self.rows], device=device)
        positions = [[len(row.request.tokens) + len(row.tokens) - 1] for row in self.rows]
        positions_B1 = torch.tensor(positions, device=device)
        logits = self.model(last, past_key_values=cache, position_ids=positions_B1).logits[:, -1]
        share = cache.kv_bytes // len(self.rows)
        for row in self.rows:
            row.rows = max(row.rows, len(self.rows))
            row.kv_bytes_peak = max(row.kv_bytes_peak, share)
        self._take(logits, self.rows)

    def _take(self, logits_BV: Tensor, rows: list[_Row]) -> None:
        """Add the next token to each row."""
        broken_B = logits_BV.isnan().any(-1)
        chosen = self.sampling.choose(
            torch.where(broken_B[:, None], 0, logits_BV), [row.generator for row in rows]
        )
        now = time.perf_counter()
        for row, token, broken in zip(rows, chosen, broken_B.tolist(), strict=True):
            row.nan = broken
            if not broken:
                row.tokens.append(token)
                row.times.append(now)

    def _report(self, row: _Row, finish: str, cache: PagedCache, place: int) -> Finished:
        early, late = _pace(row.times)
        note = None
        if finish == "nan":
            note = (
                f"the model's logits are NaN after {len(row.request.tokens) + len(row.tokens)} tokens: its weights "
                "are damaged, or the dtype is too narrow"
            )
        return Finished(
            request=row.request,
            tokens=tuple(row.tokens),
            finish=finish,
            note=note,
            ms_per_token_early=early,
            ms_per_token_late=late,
            seconds=(row.times[-1] if row.times else time.perf_counter()) - row.started,
            rows=row.rows,
            kv_bytes_peak=row.kv_bytes_peak,
            dense_kv_bytes=cache.row_dense_kv_bytes(place),
            evicted=cache.row_evicted(place),
        )


def _pace(times: list[float]) -> tuple[float | None, float | None]:
    """Milliseconds per token over the first and the last quarter."""
    if len(times) < _FEWEST_TIMED:
        return None, None
    quarter = len(times) // 4
    return (
        1000 * (times[quarter] - times[0]) / quarter,
        1000 * (times[-1] - times[-1 - quarter]) / quarter,
    )
