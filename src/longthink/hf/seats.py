"""`Seats`: rows that decode side by side in one cache, a finished one giving its place to the next.

No threads and no queue here: `Engine` has them.

Shape suffixes: B batch rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longthink.hf.cache import PagedCache
from longthink.hf.request import Finished, Request
from longthink.hf.sampling import choose_each, generator_for
from longthink.hf.step import Compile, DecodeStep, compiles

_FEWEST_TIMED = 8
"""Tokens below which a row's quarters are too short to be timed."""
_PARKED_TOKENS = 64
"""Tokens after which an empty seat is put back to its start, so that a cache that grows does not grow for nobody."""


@dataclass(eq=False)
class Row:
    """A request that is being decoded."""

    request: Request
    generator: torch.Generator = field(init=False)
    started: float = 0.0
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    rows: int = 1
    kv_bytes_peak: int = 0
    nan: bool = False

    def __post_init__(self) -> None:
        self.generator = generator_for(self.request.key)

    @property
    def length(self) -> int:
        """Tokens of prompt and text."""
        return len(self.request.tokens) + len(self.tokens)

    def finish(self, ends: frozenset[int]) -> str | None:
        """Say why the row is complete, or None while it is not."""
        if self.nan:
            return "nan"
        if self.tokens[-1] in ends:
            return "stop"
        return "length" if len(self.tokens) >= self.request.max_new_tokens else None


class Seats:
    """The rows that are being decoded, and the cache that they share.

    Every row counts its own positions and has its own budget. A prompt is read alone and then takes a free seat in
    place; so memory for prompts is that of one.

    Parameters
    ----------
    model
        The model.
    spare
        An open cache of the wanted policy and budget; it stays empty.
    count
        Rows decoded side by side at most.
    prefill_chunk_size
        Tokens of a prompt to read at once; None reads it in one go.
    compile
        Whether steps are compiled. Then each has `count` rows: an empty seat decodes a text of its own that nobody
        sees. Otherwise the batch is as large as there are rows. ``auto`` changes over once it pays.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spare: PagedCache,
        count: int,
        *,
        prefill_chunk_size: int | None = None,
        compile: Compile = False,
    ) -> None:
        self.model = model
        self.count = count
        self.rows: list[Row | None] = []
        self._spare = spare
        self._cache: PagedCache | None = None
        self._piece = prefill_chunk_size
        self._compile = compile
        # Tokens that were asked for so far, and the steps that they make at least.
        self._asked = self._steps = 0
        self._static = compile is True
        self._step: DecodeStep | None = None
        # What each empty seat has decoded, in a static batch.
        self._parked: list[int] = []
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or [])

    @property
    def taken(self) -> int:
        """Seats with a row."""
        return sum(row is not None for row in self.rows)

    # Coming and going ---------------------------------------------------------------------------------------

    def read(self, row: Row) -> PagedCache:
        """Read the prompt of a row that has no seat yet, and choose its first token.

        Raises
        ------
        BudgetError
            If the prompt does not fit.
        """
        row.started = time.perf_counter()
        cache = self._spare.fresh()
        try:
            logits_BV = self._prefill(row.request.tokens, cache)
            row.kv_bytes_peak = cache.kv_bytes
            self._take(logits_BV, [row])
        except BaseException:
            cache.close()
            raise
        return cache

    def sit(self, row: Row, cache: PagedCache) -> None:
        """Give a row, with the cache that read its prompt, a free seat."""
        assert self.taken < self.count
        self._asked += row.request.max_new_tokens
        self._steps = max(self._steps, row.request.max_new_tokens, self._asked // self.count)
        self._static = self._static or compiles(
            self.model, self._spare, self._compile, rows=self.count, tokens=self._steps
        )
        if self._cache is None and not self._static:
            self._cache, self.rows = cache, [row]
            self._step = DecodeStep(self.model, cache, compile=False)
            return
        with cache:
            if self._static and (self._step is None or not self._step.compiled):
                self._widen()
            assert self._cache is not None
            place = self.rows.index(None) if None in self.rows else len(self.rows)
            self._cache.adopt(place, cache)
            self.rows[place : place + 1] = [row]

    def _widen(self) -> None:
        """Go over to steps of one shape, with a row for every seat."""
        if self._cache is None:
            self._cache = self._parked_cache()
        missing = self.count - len(self.rows)
        self._cache.batch_select_indices(torch.tensor([*range(len(self.rows)), *[0] * missing]))
        self.rows += [None] * missing
        self._parked = [_PARKED_TOKENS] * self.count
        self._step = DecodeStep(self.model, self._cache, compile=self._compile, tokens=self._steps)

    def rise(self, row: Row) -> None:
        """Free the seat of a row."""
        place = self.rows.index(row)
        self.rows[place] = None
        if self._static:
            self._parked[place] = _PARKED_TOKENS

    def clear(self) -> None:
        """Free all seats and their memory."""
        if self._cache is not None:
            self._cache.close()
        self._cache, self._step, self.rows = None, None, []

    def idle(self) -> None:
        """Give memory back while there is nothing to decode; a static batch keeps its own."""
        if not self.taken and not self._static:
            self.clear()

    # Decoding -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """One token for every row."""
        self._settle()
        cache, step = self._cache, self._step
        assert cache is not None and step is not None
        tokens = [[0 if row is None else row.tokens[-1]] for row in self.rows]
        logits_BV = step(torch.tensor(tokens, device=self.model.device))
        if self._static and not step.compiled:
            self._static, self._compile = False, False
        self._parked = [tokens + 1 for tokens in self._parked]
        share = cache.kv_bytes // len(self.rows)
        taken = [place for place, row in enumerate(self.rows) if row is not None]
        rows = [row for row in self.rows if row is not None]
        for row in rows:
            row.rows = max(row.rows, len(rows))
            row.kv_bytes_peak = max(row.kv_bytes_peak, share)
        self._take(logits_BV if len(taken) == len(self.rows) else logits_BV[taken], rows)

    def _settle(self) -> None:
        """Let empty seats go, or put them back to their start."""
        assert self._cache is not None
        if self._static:
            due = [p for p, row in enumerate(self.rows) if row is None and self._parked[p] >= _PARKED_TOKENS]
            if due:
                with self._parked_cache() as parked:
                    for place in due:
                        self._cache.adopt(place, parked)
                        self._parked[place] = 1
            return
        kept = [place for place, row in enumerate(self.rows) if row is not None]
        if len(kept) < len(self.rows):
            self.rows = [self.rows[place] for place in kept]
            self._cache.keep_rows(kept)

    def _parked_cache(self) -> PagedCache:
        """Cache of one row that has read one token, whichever."""
        cache = self._spare.fresh()
        self._prefill((0,), cache)
        return cache

    @torch.no_grad()
    def _prefill(self, tokens: tuple[int, ...], cache: PagedCache) -> Tensor:
        """Logits behind a prompt."""
        ids = torch.tensor([tokens], device=self.model.device)
        with cache.begin_chunked_prefill(len(tokens)):
            for piece in ids.split(self._piece or len(tokens), 1):
                logits = self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]

    def _take(self, logits_BV: Tensor, rows: list[Row]) -> None:
        """Add the next token to each row."""
        broken_B = logits_BV.isnan().any(-1)
        chosen = choose_each(
            torch.where(broken_B[:, None], 0, logits_BV),
            [row.request.sampling for row in rows],
            [row.generator for row in rows],
        )
        now = time.perf_counter()
        for row, token, broken in zip(rows, chosen, broken_B.tolist(), strict=True):
            row.nan = broken
            if not broken:
                row.tokens.append(token)
                row.times.append(now)

    # What became of a row -----------------------------------------------------------------------------------

    def report(self, row: Row, finish: str, own: PagedCache | None = None) -> Finished:
        """Say what became of a row in its seat, or of one that still has a cache of its own."""
        cache, place = (self._cache, self.rows.index(row)) if own is None else (own, 0)
        assert cache is not None
        early, late = _pace(row.times)
        note = None
        if finish == "nan":
            note = (
                f"the model's logits are NaN after {row.length} tokens: its weights are damaged, or the dtype is "
                "too narrow"
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
