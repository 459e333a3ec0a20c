"""`Batch`: the requests that decode side by side in one cache; a finished one frees its seat for the next.

A seat is a row of the batch ("slot" means a token's place in the KV cache here). No threads and no queue: `Scheduler`
has those.

Shape suffixes: B batch rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import time
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longthink.hf.cache import PagedCache
from longthink.hf.guard import check_bound, check_run
from longthink.hf.placement import device_of
from longthink.hf.request import Finished, Job
from longthink.hf.sampling import sample_rows
from longthink.hf.step import Compile, DecodeStep, compiles

_FEWEST_TIMED = 8
"""Tokens below which the quarters of a request are too short to time."""
_PADDING_TOKENS = 64
"""Tokens after which a padding row is reset, so that it does not grow a cache that can grow."""


class Batch:
    """Running requests and the cache that they share.

    Each row counts its own positions and has its own budget. A prompt is prefilled in a cache of its own and then
    copied into a free seat, so prefill needs memory for one prompt, whatever the number of seats.

    Parameters
    ----------
    template
        An open, empty cache with the policy and budget to use.
    seats
        Largest number of rows.
    prefill_chunk_size
        Prompt tokens to prefill at a time; None for all at once.
    compile
        Whether steps are compiled. A compiled step always has `seats` rows: empty seats hold padding rows, whose
        output is discarded. An eager step has a row for each running request. ``auto`` switches to compiled steps
        once they pay.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        template: PagedCache,
        seats: int,
        *,
        prefill_chunk_size: int | None = None,
        compile: Compile = False,
    ) -> None:
        self.model = model
        self.seats = seats
        self.rows: list[Job | None] = []
        self._template = template
        self._cache: PagedCache | None = None
        self._chunk_size = prefill_chunk_size
        self._compile = compile
        self._steps = 0
        self._static = compile is True
        self._step: DecodeStep | None = None
        # Of each seat in a static batch: tokens that its padding row has decoded.
        self._padding_age: list[int] = []
        self.end_tokens = end_tokens(model)

    @property
    def occupied(self) -> int:
        """Seats with a request."""
        return sum(row is not None for row in self.rows)

    # Admission and release ----------------------------------------------------------------------------------

    def prefill(self, job: Job) -> PagedCache:
        """Prefill a request that has no seat yet and sample its first token; `BudgetError` if it does not fit."""
        job.started = time.perf_counter()
        after, tokens = job.request.after, job.request.tokens
        if after is None:
            cache = self._template.fresh()
        else:
            assert after.cache is not None
            # The last token of a text is not in its cache.
            cache, tokens = deepcopy(after.cache).open(), (after.tokens[-1], *tokens)
        try:
            logits_BV = self._prefill(tokens, cache)
            job.kv_bytes_peak = cache.kv_bytes
            self._append_tokens(logits_BV, [job])
        except BaseException:
            cache.close()
            raise
        return cache

    def admit(self, job: Job, cache: PagedCache) -> None:
        """Give a prefilled request, whose cache this is, a free seat."""
        assert self.occupied < self.seats
        if self._cache is None and not self._static:
            self._cache, self.rows = cache, [job]
            self._step = DecodeStep(self.model, cache, compile=False)
            return
        with cache:
            if self._static and (self._step is None or not self._step.compiled):
                self._make_static()
            assert self._cache is not None
            seat = self.rows.index(None) if None in self.rows else len(self.rows)
            self._cache.adopt(seat, cache)
            self.rows[seat : seat + 1] = [job]

    def _make_static(self) -> None:
        """Switch to compiled steps: one shape, with a row for every seat."""
        if self._cache is None:
            self._cache = self._padding_cache()
        missing = self.seats - len(self.rows)
        self._cache.batch_select_indices(torch.tensor([*range(len(self.rows)), *[0] * missing]))
        self.rows += [None] * missing
        self._padding_age = [_PADDING_TOKENS] * self.seats
        self._step = DecodeStep(self.model, self._cache, compile=self._compile, tokens=self._steps)

    def release(self, job: Job) -> None:
        """Free the seat of a request."""
        seat = self.rows.index(job)
        self.rows[seat] = None
        if self._static:
            self._padding_age[seat] = _PADDING_TOKENS

    def clear(self) -> None:
        """Free all seats and their memory."""
        if self._cache is not None:
            self._cache.close()
        self._cache, self._step, self.rows = None, None, []

    def free_idle(self) -> None:
        """Free the memory if nothing is running; a static batch keeps its own."""
        if not self.occupied and not self._static:
            self.clear()

    # Decoding -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token of every running request."""
        # With ``auto`` after as many steps as would have paid: requests may end early.
        if not self._static and compiles(
            self.model, self._template, self._compile, rows=self.seats, tokens=self._steps
        ):
            self._static = True
            self._make_static()
        self._compact()
        self._steps += 1
        cache, step = self._cache, self._step
        assert cache is not None and step is not None
        tokens = [[0 if job is None else job.tokens[-1]] for job in self.rows]
        logits_BV = step(torch.tensor(tokens, device=device_of(self.model)))
        if self._static and not step.compiled:
            self._static, self._compile = False, False
        self._padding_age = [age + 1 for age in self._padding_age]
        share = cache.kv_bytes // len(self.rows)
        occupied = [seat for seat, job in enumerate(self.rows) if job is not None]
        jobs = [job for job in self.rows if job is not None]
        for job in jobs:
            job.rows = max(job.rows, len(jobs))
            job.kv_bytes_peak = max(job.kv_bytes_peak, share)
        self._append_tokens(logits_BV if len(occupied) == len(self.rows) else logits_BV[occupied], jobs)

    def _compact(self) -> None:
        """Remove empty rows; in a static batch reset padding rows that are due."""
        assert self._cache is not None
        if self._static:
            due = [
                i
                for i, row in enumerate(self.rows)
                if row is None and self._padding_age[i] >= _PADDING_TOKENS
            ]
            if due:
                with self._padding_cache() as padding:
                    for seat in due:
                        self._cache.adopt(seat, padding)
                        self._padding_age[seat] = 1
            return
        kept = [seat for seat, job in enumerate(self.rows) if job is not None]
        if len(kept) < len(self.rows):
            self.rows = [self.rows[seat] for seat in kept]
            self._cache.keep_rows(kept)

    def _padding_cache(self) -> PagedCache:
        cache = self._template.fresh()
        self._prefill((0,), cache)
        return cache

    @torch.no_grad()
    def _prefill(self, tokens: tuple[int, ...], cache: PagedCache) -> Tensor:
        ids = torch.tensor([tokens], device=device_of(self.model))
        with cache.begin_chunked_prefill(len(tokens)):
            for chunk in ids.split(self._chunk_size or len(tokens), 1):
                logits = self.model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        check_run(cache, len(tokens))
        return logits[:, -1]

    def _append_tokens(self, logits_BV: Tensor, jobs: list[Job]) -> None:
        nan_B = logits_BV.isnan().any(-1)
        chosen = sample_rows(
            torch.where(nan_B[:, None], 0, logits_BV),
            [job.request.sampling for job in jobs],
            [job.generator for job in jobs],
        )
        now = time.perf_counter()
        for job, token, nan in zip(jobs, chosen, nan_B.tolist(), strict=True):
            job.nan = nan
            if not nan and not job.done:
                job.tokens.append(token)
                job.times.append(now)

    def result(
        self, job: Job, finish: str, own: PagedCache | None = None, *, in_step: bool = False
    ) -> Finished:
        """Result of a request in its seat, or of one that was not admitted and has a cache of its `own`.

        While a step is under way (`in_step`), layers have read different tokens: the cache is not checked nor kept.
        """
        cache, row = (self._cache, self.rows.index(job)) if own is None else (own, 0)
        assert cache is not None
        if not in_step:
            check_bound(cache)
        keeps = job.request.keep_cache and job.tokens and not in_step
        early, late = _pace(job.times)
        note = None
        if finish == "nan":
            length = len(job.request.tokens) + len(job.tokens)
            note = (
                f"the model's logits are NaN after {length} tokens: its weights are damaged, or the dtype is too "
                "narrow"
            )
        return Finished(
            request=job.request,
            tokens=tuple(job.tokens),
            finish=finish,
            note=note,
            ms_per_token_early=early,
            ms_per_token_late=late,
            seconds=(job.times[-1] if job.times else time.perf_counter()) - job.started,
            rows=job.rows,
            kv_bytes_peak=job.kv_bytes_peak,
            dense_kv_bytes=cache.row_dense_kv_bytes(row),
            evicted=cache.row_evicted(row),
            cache=cache.row(row) if keeps else None,
        )


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end a text of the model."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return frozenset([ends] if isinstance(ends, int) else ends or [])


def _pace(times: list[float]) -> tuple[float | None, float | None]:
    """Milliseconds per token over the first and the last quarter."""
    if len(times) < _FEWEST_TIMED:
        return None, None
    quarter = len(times) // 4
    early, late = times[quarter] - times[0], times[-1] - times[-1 - quarter]
    return 1000 * early / quarter, 1000 * late / quarter
