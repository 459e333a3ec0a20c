"""`Engine`: requests of many callers through a fixed number of seats on one model."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from longthink.config import DEFAULT_POLICY, check_int
from longthink.errors import BudgetError, EngineError, NonFiniteError
from longthink.hf.batch import Batch
from longthink.hf.cache import PagedCache, make_cache
from longthink.hf.request import Finished, Request
from longthink.hf.sampling import Sampling
from longthink.hf.scheduler import Job, Scheduler
from longthink.hf.step import Compile, check_compile
from longthink.policies import Policy

_GREEDY = Sampling()


class Handle:
    """A request that was submitted. Iterate over it for its tokens as they come; any number of threads may."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine = engine
        self._job = job

    @property
    def request(self) -> Request:
        """What was asked for."""
        return self._job.state.request

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._job.done

    def cancel(self) -> None:
        """End it before the next step, and give its seat to another; it keeps its tokens. Nothing if it is done."""
        self._engine._scheduler.cancel(self._job)

    def __iter__(self) -> Iterator[int]:
        """Yield its tokens from the first one on, each as soon as it is there.

        Raises
        ------
        BudgetError
            If the prompt does not fit.
        NonFiniteError
            After the tokens before it, if the model produces NaN.
        EngineError
            After the tokens before it, if decoding failed; the cause is chained.
        """
        yield from self._job.tokens()
        finished = self.result()
        if finished.finish == "no_room":
            raise BudgetError(finished.note)
        if finished.finish == "nan":
            raise NonFiniteError(finished.note)

    def result(self, timeout: float | None = None) -> Finished:
        """Wait until it is done.

        A prompt without room and broken numbers are results as well: see `Finished`.

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
                f"decoding failed with {type(error).__name__}: {error}; tokens before it: {len(self._job.state.tokens)}"
            ) from error
        return self._job.finished


class Engine:
    """A small continuous scheduler: a fixed number of seats on one model, each with its own bounded cache row.

    When a row is complete, the next prompt is read alone and takes its seat at once, in place. Every row counts its
    own positions and has its own budget, so the memory for any number of requests is that of the seats. Only the
    model's end tokens (from its generation config) end a row: penalties and other settings of that config are not
    applied.

    What a request gives does not depend on its neighbours but through the rounding of batched arithmetic: in float32
    the tokens are those of `generate`, in narrower formats two nearly equal logits may change places.

    Use it in a ``with`` block, or close it. Until then the model attends through longthink.

    Parameters
    ----------
    model
        A decoder-only transformers model with full attention.
    policy
        What to keep: a policy, its name, or a text such as ``raas:r=0.25``.
    budget, decode_budget
        Tokens to keep in each layer and row: prompt included, or on top of the prompt. Exactly one of the two,
        and none for ``dense``.
    seats
        Rows decoded side by side at most.
    prefill_chunk_size
        Tokens of a prompt to read at once; None reads it in one go.
    kv_dtype
        Format that keys and values are kept in; see `make_cache`.
    compile
        Whether the decode step is compiled into one program. That takes about a minute, once for each model, policy,
        budget and number of seats, and makes each token cheaper. Every step then has `seats` rows, whether taken or
        not; otherwise the batch shrinks while seats are empty. ``auto`` changes over to it when requests have asked
        for `longthink.hf.PAYS_FROM` steps (a request for so many tokens, or all together for so many times `seats`),
        or where the program is there already, and goes on eagerly where compiling fails.

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
        compile: Compile = "auto",
        prefill_chunk_size: int | None = None,
    ) -> None:
        check_int("seats", seats, 1)
        check_compile(compile)
        if prefill_chunk_size is not None:
            check_int("prefill_chunk_size", prefill_chunk_size, 1)
        # It stays empty, and keeps the model attending through longthink until the end.
        spare = make_cache(
            model, policy=policy, budget=budget, decode_budget=decode_budget, kv_dtype=kv_dtype
        )
        self.seats = seats
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._numbers = itertools.count()
        self._scheduler = Scheduler(
            Batch(model, spare, seats, prefill_chunk_size=prefill_chunk_size, compile=compile)
        )
        self._closer = weakref.finalize(self, _close, self._scheduler, spare)

    def submit(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        max_new_tokens: int,
        sampling: Sampling = _GREEDY,
        key: str | None = None,
        tag: Any = None,
    ) -> Handle:
        """Ask for a text and return at once; a thread of the engine decodes it. Any thread may call this.

        Parameters
        ----------
        tokens
            Token ids of one prompt: integers, or a tensor of shape (N,) or (1, N).
        max_new_tokens
            Tokens after which it is cut off.
        sampling
            How tokens are chosen.
        key
            Seeds the request's random generator; by default the number of the request.
        tag
            Anything to find in the result.

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
                    f"tokens of shape {tuple(tokens.shape)}: allowed is one prompt, (N,) or (1, N)"
                )
            tokens = tokens.flatten().tolist()
        number = next(self._numbers)
        request = Request(
            key=str(number) if key is None else key,
            tokens=tuple(tokens),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            tag=tag,
        )
        return self._add(request, in_thread=True)

    def map(self, requests: Iterable[Request]) -> Iterator[Finished]:
        """Decode requests in the calling thread and yield each as soon as it is complete.

        Requests are taken one by one, when there is a seat for them. If the iteration is given up, those that are
        not complete are cancelled.

        Raises
        ------
        EngineError
            If the engine is closed.
        Exception
            Whatever the model raises.
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
        handle = Handle(self, Job(request))
        self._scheduler.add(handle._job, in_thread=in_thread)
        return handle

    def close(self) -> None:
        """Cancel what is not complete, free the memory, and give the model its own attention implementation back.

        Waits for the step that is being decoded. Nothing that waits for a handle waits for ever.
        """
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _close(scheduler: Scheduler, spare: PagedCache) -> None:
    scheduler.close()
    spare.close()
