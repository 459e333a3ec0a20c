"""The worker for vLLM: an engine in this process, dense or with a bounded cache.

Jobs share the engine. The mode "" decodes requests from a context on, `IN_FLIGHT` submits more requests than fit and
reports how many run, and `FULL`, after that, decodes as many as the pool has room for at a context.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.protocol import Job, serve
from longthink.policies import make_policy, needs_budget
from longthink.vllm.config import KEY
from longthink.vllm.versions import installed

IN_FLIGHT = "in flight"
FULL = "full pool"
FULL_STEPS = 16
"""Steps per turn in mode `FULL`: each request opens one page, and dense ones stay short enough for the pool."""
SETTINGS = {
    # The engine in this process, whose CPU time is measured.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_PAGE = 16
_LONG_REQUESTS, _SPARE = 2, 256
"""The pool holds this many requests of the longest context, each with some tokens to spare: blocks may be large."""
_MAX_REQUESTS = 64
_STEADY = 32
"""Steps without a change after which the number of running requests is final."""
_VOCABULARY = 1000


class _Engine:
    """An engine and its requests."""

    def __init__(self, job: Job) -> None:
        import torch

        from vllm import LLM

        self.bounded = needs_budget(make_policy(job.system))
        self.max_tokens = job.prompt + job.steps
        self.pool_tokens = _LONG_REQUESTS * (self.max_tokens + _SPARE)
        arguments: dict[str, Any] = {}
        if self.bounded:
            options = {
                "policy": job.system,
                "decode_budget": job.budget,
                "max_prompt_tokens": job.prompt,
                "reserve": True,
            }
            arguments = {
                "block_size": _PAGE,
                "attention_backend": "CUSTOM",
                "additional_config": {KEY: options},
            }
        self._engine = LLM(
            model=job.folder,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=self.max_tokens,
            max_num_seqs=_MAX_REQUESTS,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=self.pool_tokens * _bytes_per_token(job.folder),
            seed=0,
            **arguments,
        ).llm_engine
        torch.set_num_threads(1)
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._submitted = 0
        self.step: Callable[[], Any] = self._engine.step

    @property
    def running(self) -> list[Any]:
        """Requests that hold pages."""
        running: list[Any] = self._scheduler.running
        return running

    @property
    def decoding(self) -> list[Any]:
        """Running requests that have written a token."""
        return [request for request in self.running if request.num_output_tokens]

    @property
    def waiting(self) -> int:
        """Number of requests that wait for pages."""
        return len(self._scheduler.waiting)

    def add(self, requests: int, tokens: int) -> None:
        """Submit requests with random prompts of `tokens` tokens or a few less, and answers as long as there is room.

        With prompts of one length all requests would open their pages in the same step, unlike those of a server.
        """
        import torch

        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=self.max_tokens - tokens, ignore_eos=True, detokenize=False
        )
        for length in (tokens - number % _PAGE for number in range(requests)):
            seed = torch.Generator().manual_seed(self._submitted)
            prompt = torch.randint(3, _VOCABULARY, (length,), generator=seed).tolist()
            self._submitted += 1
            self._engine.add_request(str(self._submitted), {"prompt_token_ids": prompt}, sampling)

    def clear(self) -> None:
        """Abort all requests."""
        self._engine.abort_request([str(number + 1) for number in range(self._submitted)])
        self.step()


class _Decoding:
    """Requests at a context."""

    def __init__(self, engine: _Engine, job: Job) -> None:
        self._engine = engine
        # Dense requests read the context as a prompt; bounded ones would keep a prompt, so they decode it.
        prompt = job.prompt if engine.bounded else job.context
        if not engine.bounded or not engine.running:
            engine.clear()
            engine.add(job.rows, prompt)
        while len(engine.running) < job.rows or self._shortest() <= max(job.context, prompt):
            engine.step()

    def _shortest(self) -> int:
        return min(request.num_tokens for request in self._engine.running)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._engine.step()

    def facts(self) -> dict[str, Any]:
        return {"running": len(self._engine.decoding)}


class _InFlight:
    """More requests than fit, each of which is to grow to the context."""

    def __init__(self, engine: _Engine, job: Job) -> None:
        engine.clear()
        prompt = job.prompt if engine.bounded else job.context
        engine.add(job.rows, prompt)
        # A bounded request is at its largest once its budget is full, a dense one after its prompt.
        full = prompt + job.budget + _PAGE if engine.bounded else prompt
        steady, before = 0, None
        while steady < _STEADY:
            engine.step()
            decoding = engine.decoding
            read = sum(request.num_computed_tokens for request in engine.running if request not in decoding)
            now = (len(decoding), read, engine.waiting)
            filled = bool(decoding) and min(request.num_tokens for request in decoding) > full
            steady, before = steady + 1 if filled and now == before else 0, now
        self._facts = {
            "in_flight": len(engine.decoding),
            "waiting": engine.waiting + len(engine.running) - len(engine.decoding),
            "preempted": sum(request.num_preemptions for request in engine.running),
        }

    def decode(self, steps: int) -> None:
        raise NotImplementedError("requests in flight are counted, not timed")

    def facts(self) -> dict[str, Any]:
        return self._facts


def _fill(engine: _Engine, job: Job) -> _Decoding:
    """Return as many requests as the pool holds: bounded ones continue, dense ones are as many as fit at the context.

    None must be preempted, so there is room for partly filled blocks and for the timed steps.
    """
    if engine.bounded:
        return _Decoding(engine, replace(job, rows=len(engine.running), context=0))
    fits = engine.pool_tokens // (job.context + _SPARE)
    return _Decoding(engine, replace(job, rows=min(fits, job.rows)))


def _bytes_per_token(folder: str) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4


class VllmHost:
    """One engine, made for the first job."""

    def __init__(self) -> None:
        os.environ |= SETTINGS
        found = installed()
        self.packages: tuple[str, ...] = (found.distribution if found else "vllm", "torch", "transformers")
        self._engine: _Engine | None = None

    def open(self, job: Job) -> _Decoding | _InFlight:
        """Bring the engine to the state of a job."""
        self._engine = self._engine or _Engine(job)
        modes: dict[str, Callable[[_Engine, Job], _Decoding | _InFlight]]
        modes = {"": _Decoding, IN_FLIGHT: _InFlight, FULL: _fill}
        return modes[job.mode](self._engine, job)


if __name__ == "__main__":
    serve(VllmHost())
