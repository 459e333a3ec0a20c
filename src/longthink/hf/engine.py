"""`Engine`: continuous batching of many callers' requests on one model: what users see of `Scheduler`."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from longthink.config import DEFAULT_POLICY, KvBits, check_int
from longthink.errors import BudgetError, EngineError, NonFiniteError, UnsupportedModelError
from longthink.hf.batch import Batch
from longthink.hf.cache import PagedCache, make_cache
from longthink.hf.guard import check_limit
from longthink.hf.request import Finished, Job, Request
from longthink.hf.sampling import Sampling
from longthink.hf.scheduler import Scheduler
from longthink.hf.step import Compile, check_compile
from longthink.hf.support import scales_by_columns
from longthink.policies import Policy

_GREEDY = Sampling()


class Handle:
    """A submitted request. Iterating over it yields its tokens as they are decoded, in any number of threads."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine = engine
        self._job = job

    @property
    def request(self) -> Request:
        return self._job.request

    @property
    def done(self) -> bool:
        """Whether it has ended; no more tokens will come."""
        return self._job.done

    def cancel(self) -> None:
        """End it before the next step and free its seat; its tokens so far stay. No effect if it is done."""
        self._engine._scheduler.cancel(self._job)

    def __iter__(self) -> Iterator[int]:
        """Yield its tokens from the first one on, as they are decoded.

        Raises
        ------
        BudgetError
            If the prompt does not fit.
        NonFiniteError
            If the model produces NaN, after the tokens before it.
        EngineError
            If decoding failed, after the tokens before it; the cause is chained.
        """
        yield from self._job.stream()
        finished = self.result()
        if finished.finish == "no_room":
            raise BudgetError(finished.note)
        if finished.finish == "nan":
            raise NonFiniteError(finished.note)

    def result(self, timeout: float | None = None) -> Finished:
        """Wait until it is done and return its result.

        A prompt that does not fit and NaN are results too: see `Finished.finish`.

        Parameters
        ----------
        timeout
            Seconds to wait; None waits as long as it takes.

        Raises
        ------
        TimeoutError
            If it is not done by then.
        EngineError
            If decoding failed; the cause is chained.
        """
        if not self._job.wait(timeout):
            raise TimeoutError(f"request {self.request.key!r} is not done after {timeout} s")
        if self._job.finished is None:
            error = self._job.error
            raise EngineError(
                f"decoding failed after {len(self._job.tokens)} tokens with {type(error).__name__}: {error}"
            ) from error
        return self._job.finished


class Engine:
    """Continuous batching with a fixed number of seats on one model, each a row of one bounded cache.

    When a request finishes, the next prompt is prefilled alone and takes over its seat, in place. Each row counts its
    own positions and has its own budget, so memory depends on the number of seats, not of requests. Of the model's
    generation config only the end tokens are used: penalties and other settings are not applied.

    A request's tokens depend on its neighbours only through the rounding of batched arithmetic: in float32 they are
    those of `generate`; in narrower formats nearly equal logits may swap.

    Use it in a ``with`` block, or close it. Until then the model's attention goes through longthink.

    Parameters
    ----------
    model
        A decoder-only transformers model.
    policy
        What to keep: a policy, its name, or a spec such as ``raas:r=0.25``.
    budget, decode_budget
        Tokens to keep per layer and row: including the prompt, or on top of it. Give exactly one; neither for
        ``dense``.
    seats
        Largest number of requests decoded at once.
    prefill_chunk_size
        Prompt tokens to prefill at a time; None for all at once.
    kv_dtype, kv_bits
        Format that keys and values are stored in, and bits of those outside the recent window; see `make_cache`.
    compile
        Whether to compile the decode step. Compiling takes about a minute, once for each model, policy, budget and
        number of seats, and makes each token cheaper. A compiled step always has `seats` rows; an eager one has a row
        for each running request. ``auto`` switches to compiled steps after `longthink.hf.PAYS_FROM` eager ones, or if
        this shape has been compiled before; it decodes eagerly if compiling fails.

    Raises
    ------
    BudgetError
        If the budget does not suit the policy.
    UnsupportedModelError
        If the model would be served wrongly.
    ValueError
        If an argument is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        policy: str | Policy = DEFAULT_POLICY,
        budget: int | None = None,
        decode_budget: int | None = None,
        seats: int = 16,
        kv_dtype: str | None = None,
        kv_bits: KvBits | int | str | None = None,
        compile: Compile = "auto",
        prefill_chunk_size: int | None = None,
    ) -> None:
        check_int("seats", seats, 1)
        check_compile(compile)
        if prefill_chunk_size is not None:
            check_int("prefill_chunk_size", prefill_chunk_size, 1)
        # It stays empty; while it is open, the model's attention goes through longthink.
        template = make_cache(
            model,
            policy=policy,
            budget=budget,
            decode_budget=decode_budget,
            kv_dtype=kv_dtype,
            kv_bits=kv_bits,
        )
        template.binding.use.used = True
        if scales_by_columns(model.config):
            template.close()
            raise UnsupportedModelError(
                f"{type(model).__name__} scales its queries by the number of columns in its cache, one for all rows, "
                "and an engine seats rows of different lengths: use longthink.generate with a batch"
            )
        self.seats = seats
        self._limit = template.binding.use.limit
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._numbers = itertools.count()
        self._scheduler = Scheduler(
            Batch(model, template, seats, prefill_chunk_size=prefill_chunk_size, compile=compile)
        )
        self._closer = weakref.finalize(self, _close, self._scheduler, template)

    def submit(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        max_new_tokens: int,
        sampling: Sampling = _GREEDY,
        key: str | None = None,
        tag: Any = None,
        keep_cache: bool = False,
        after: Finished | None = None,
    ) -> Handle:
        """Queue a request and return at once; the engine's thread decodes it. Any thread may call this.

        Parameters
        ----------
        tokens
            Token ids of one prompt: integers, or a tensor of shape (N,) or (1, N).
        key
            Seeds the request's random generator; by default the number of the request.
        max_new_tokens, sampling, tag, keep_cache, after
            As in `longthink.hf.Request`. A conversation goes on with ``after=handle.result()`` of a request that was
            submitted with ``keep_cache=True``; several may follow the same one.

        Raises
        ------
        EngineError
            If the engine is closed.
        ValueError
            If an argument is out of range.
        """
        if isinstance(tokens, Tensor):
            if tokens.numel() != tokens.shape[-1]:
                raise ValueError(
                    f"tokens of shape {tuple(tokens.shape)}: allowed is one prompt, shape (N,) or (1, N)"
                )
            tokens = tokens.flatten().tolist()
        number = next(self._numbers)
        request = Request(
            key=str(number) if key is None else key,
            tokens=tuple(tokens),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            tag=tag,
            keep_cache=keep_cache,
            after=after,
        )
        return self._add(request, in_thread=True)

    def map(self, requests: Iterable[Request]) -> Iterator[Finished]:
        """Decode requests in the calling thread and yield each result as soon as it is complete.

        Requests are taken from the iterable one by one, as seats become free. Abandoning the iteration cancels those
        that are running.

        Raises
        ------
        EngineError
            If the engine is closed.
        Exception
            Any error that the model raises.
        """
        source, running = iter(requests), list[Handle]()
        try:
            while True:
                for request in itertools.islice(source, self.seats - len(running)):
                    running.append(self._add(request, in_thread=False))
                if not running:
                    return
                self._scheduler.step()
                done = [handle for handle in running if handle.done]
                running = [handle for handle in running if handle not in done]
                for handle in done:
                    if handle._job.error is not None:
                        raise handle._job.error
                    yield handle.result()
        finally:
            for handle in running:
                handle.cancel()
            self._scheduler.drop_cancelled()

    def _add(self, request: Request, *, in_thread: bool) -> Handle:
        for token in request.tokens:
            check_int("token", token, 0, self._vocabulary - 1)
        # The last token is not read.
        check_limit(self._limit, len(request.tokens) + request.max_new_tokens - 1)
        handle = Handle(self, Job(request))
        self._scheduler.add(handle._job, in_thread=in_thread)
        return handle

    def close(self) -> None:
        """Wait for the current step, cancel all other work, free the memory and restore the model's attention.

        Threads that wait for a handle return.
        """
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _close(scheduler: Scheduler, template: PagedCache) -> None:
    scheduler.close()
    template.close()
