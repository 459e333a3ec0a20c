"""Decoding behind a text that is given: the cache takes it through its decode steps, and then the model goes on.

Such a text competes for the budget like one that the model has written, and only the prompt can be pinned.

Shape suffixes: B batch rows, N tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longthink.errors import BudgetError
from longthink.hf import DecodeStep, Finished, PagedCache, Request, make_cache
from longthink.hf.batch import end_tokens
from longthink.hf.guard import check_limit, check_run
from longthink.hf.request import Job
from longthink.hf.sampling import sample_rows
from longthink.lab.evaluate.forced import ForcedDecode, block_tokens, compiles
from longthink.lab.evaluate.plan import CacheConfig


class Given(NamedTuple):
    """A request and the tokens that follow its prompt, at least one."""

    request: Request
    text: tuple[int, ...]


def decode_given(
    model: PreTrainedModel, config: CacheConfig, texts: Iterable[Given], rows: int, *,
    kv_dtype: str | None = None, kv_bits: str | None = None,
) -> Iterator[Finished]:  # fmt: skip
    """Decode up to `rows` texts side by side, those of one length; texts are taken when they can be begun.

    `kv_dtype` and `kv_bits` are those of `make_cache`.

    The results are those of `Engine`; their times per token are None.
    """
    source = iter(texts)
    while batch := list(islice(source, rows)):
        alike: dict[tuple[int, int], list[Given]] = {}
        for one in batch:
            alike.setdefault((len(one.request.tokens), len(one.text)), []).append(one)
        for group in alike.values():
            opened = make_cache(model, **config._asdict(), kv_dtype=kv_dtype, kv_bits=kv_bits)
            yield from _decode(model, opened, group)


def _decode(model: PreTrainedModel, opened: PagedCache, batch: Sequence[Given]) -> list[Finished]:
    started = time.perf_counter()
    with opened as cache, torch.no_grad():
        longest = max(len(text) + len(request.tokens) + request.max_new_tokens for request, text in batch)
        check_limit(cache.binding.use.limit, longest - 1)
        try:
            logits_BV, peak = _read(model, cache, batch)
        except BudgetError as error:
            return [
                Finished(request=one.request, tokens=(), finish="no_room", note=str(error)) for one in batch
            ]
        answers = _Answers(model, cache, [Job(one.request) for one in batch], started, peak)
        step = DecodeStep(model, cache, compile=False)
        while (token_B1 := answers.append(logits_BV)) is not None:
            logits_BV = step(token_B1)
        check_run(cache, len(batch[0].request.tokens) + len(batch[0].text))
        return answers.finished()


def _read(model: PreTrainedModel, cache: PagedCache, batch: Sequence[Given]) -> tuple[Tensor, int]:
    """Read prompts and texts; return the logits behind them, and the most bytes per row on the way."""
    prompt_BN = torch.tensor([one.request.tokens for one in batch], device=model.device)
    model(prompt_BN, past_key_values=cache, use_cache=True, logits_to_keep=1)
    check_run(cache, prompt_BN.shape[1])
    peak = cache.kv_bytes
    text_BN = torch.tensor([one.text for one in batch], device=model.device)
    forced = ForcedDecode(model, cache, compile=compiles(model, text_BN.shape[1]))
    for block_BN in text_BN.split(block_tokens(model, len(batch)), 1):
        logits_BV = forced(block_BN)[:, -1]
        peak = max(peak, cache.kv_bytes)
    return logits_BV, peak // len(batch)


class _Answers:
    """The tokens that rows decode behind their texts; a row that has ended decodes on and is not looked at."""

    def __init__(
        self, model: PreTrainedModel, cache: PagedCache, jobs: Sequence[Job], started: float, peak: int
    ) -> None:
        self._ends, self._device = end_tokens(model), model.device
        self._cache, self._jobs, self._started, self._peak = cache, jobs, started, peak
        self._done: dict[int, Finished] = {}

    def append(self, logits_BV: Tensor) -> Tensor | None:
        """Choose the next token of each row and return them, B x 1; None if all rows have ended."""
        self._peak = max(self._peak, self._cache.kv_bytes // len(self._jobs))
        nan_B = logits_BV.isnan().any(-1)
        samplings = [job.request.sampling for job in self._jobs]
        generators = [job.generator for job in self._jobs]
        chosen = sample_rows(torch.where(nan_B[:, None], 0, logits_BV), samplings, generators)
        for row, (token, nan) in enumerate(zip(chosen, nan_B.tolist(), strict=True)):
            if row in self._done:
                continue
            job = self._jobs[row]
            job.nan = nan
            if not nan:
                job.tokens.append(token)
            if (finish := job.finish_reason(self._ends)) is not None:
                self._done[row] = self._result(row, job, finish)
        if len(self._done) == len(self._jobs):
            return None
        return torch.tensor(chosen, device=self._device)[:, None]

    def _result(self, row: int, job: Job, finish: str) -> Finished:
        return Finished(
            request=job.request, tokens=tuple(job.tokens), finish=finish, rows=len(self._jobs),
            seconds=time.perf_counter() - self._started, kv_bytes_peak=self._peak,
            dense_kv_bytes=self._cache.row_dense_kv_bytes(row), evicted=self._cache.row_evicted(row),
        )  # fmt: skip

    def finished(self) -> list[Finished]:
        return [self._done[row] for row in range(len(self._jobs))]
