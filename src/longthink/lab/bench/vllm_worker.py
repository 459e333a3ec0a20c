"""The worker for vLLM: an engine in this process, dense or with a bounded cache.

Asked for a context, it decodes on from there. Asked for `IN_FLIGHT`, it takes more requests than fit, and says how
many run; asked for `FULL` then, it decodes as many as the pool has room for at a context.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from longthink.lab.bench.peers.protocol import Point, serve
from longthink.policies import make_policy, needs_budget
from longthink.vllm.config import KEY
from longthink.vllm.versions import installed

IN_FLIGHT = "in flight"
"""`Point.way` for: how many of `Point.rows` requests run side by side."""
FULL = "full pool"
"""`Point.way` for: all requests of the context that the pool has room for, after `IN_FLIGHT`."""
FULL_STEPS = 16
"""Steps in a turn of such requests: each opens a page in it, and dense ones are not yet too long for the pool."""
SETTINGS = {
    # The engine in this process, whose CPU time is what counts.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_PAGE = 16
_LONG_REQUESTS, _SPARE = 2, 256
"""So many requests of the longest context the pool has room for, with some tokens to spare: blocks may be large."""
_MOST = 64
_STEADY = 32
"""Steps without a change after which nothing more is waited for."""
_VOCABULARY = 1000


class _Engine:
    """An engine, with the requests that run in it."""

    def __init__(self, point: Point) -> None:
        import torch

        from vllm import LLM

        self.policy = make_policy(point.system)
        self.bounded = needs_budget(self.policy)
        self.longest = point.prompt + point.steps
        self.pool_tokens = _LONG_REQUESTS * (self.longest + _SPARE)
        arguments: dict[str, Any] = {"block_size": _PAGE} if self.bounded else {}
        if self.bounded:
            options = {
                "policy": point.system,
                "decode_budget": point.budget,
                "max_prompt_tokens": point.prompt,
                "reserve": True,
            }
            arguments |= {"attention_backend": "CUSTOM", "additional_config": {KEY: options}}
        self._inner = LLM(
            model=point.folder,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=self.longest,
            max_num_seqs=_MOST,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=self.pool_tokens * _bytes_per_token(point.folder),
            seed=0,
            **arguments,
        ).llm_engine
        torch.set_num_threads(1)
        self._scheduler = self._inner.engine_core.engine_core.scheduler
        self._numbers = 0

    @property
    def running(self) -> list[Any]:
        """The requests that hold pages."""
        running: list[Any] = self._scheduler.running
        return running

    @property
    def waiting(self) -> int:
        """Requests that wait for pages."""
        return len(self._scheduler.waiting)

    def add(self, requests: int, tokens: int) -> None:
        """Take in requests with prompts of so many random tokens, or a few less; answers go on while there is room.

        Requests of one length would open all their pages in the same step, which those of a server do not.
        """
        import torch

        from vllm import SamplingParams

        for length in (tokens - number % _PAGE for number in range(requests)):
            drawn = torch.randint(
                3, _VOCABULARY, (length,), generator=torch.Generator().manual_seed(self._numbers)
            )
            self._numbers += 1
            sampling = SamplingParams(
                temperature=0, max_tokens=self.longest - tokens, ignore_eos=True, detokenize=False
            )
            self._inner.add_request(str(self._numbers), {"prompt_token_ids": drawn.tolist()}, sampling)

    def step(self) -> None:
        """One step of the engine."""
        self._inner.step()

    def clear(self) -> None:
        """Give all requests up."""
        self._inner.abort_request([str(number + 1) for number in range(self._numbers)])
        self._inner.step()


class _Decoding:
    """Requests at a context."""

    def __init__(self, engine: _Engine, point: Point) -> None:
        self._engine = engine
        # What a dense cache holds does not depend on who wrote it; a bounded one keeps prompts, so it must decode.
        prompt = point.prompt if engine.bounded else point.context
        if not engine.bounded or not engine.running:
            engine.clear()
            engine.add(point.rows, prompt)
        while len(engine.running) < point.rows or _shortest(engine) <= max(point.context, prompt):
            engine.step()

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._engine.step()

    def facts(self) -> dict[str, Any]:
        return {"running": len(_decoding(self._engine))}


class _InFlight:
    """More requests than fit, each of which is to become as long as the context."""

    def __init__(self, engine: _Engine, point: Point) -> None:
        engine.clear()
        prompt = point.prompt if engine.bounded else point.context
        engine.add(point.rows, prompt)
        # A bounded one holds all it ever will once it has filled its budget; a dense one is as long as it gets.
        full = prompt + point.budget + _PAGE if engine.bounded else prompt
        steady, before = 0, None
        while steady < _STEADY:
            engine.step()
            decoding = _decoding(engine)
            read = sum(request.num_computed_tokens for request in engine.running if request not in decoding)
            now = (len(decoding), read, engine.waiting)
            filled = bool(decoding) and min(request.num_tokens for request in decoding) > full
            steady, before = steady + 1 if filled and now == before else 0, now
        self._facts = {
            "in_flight": len(_decoding(engine)),
            "waiting": engine.waiting + len(engine.running) - len(_decoding(engine)),
            "preempted": sum(request.num_preemptions for request in engine.running),
        }

    def decode(self, steps: int) -> None:
        raise NotImplementedError("how many are in flight is not a matter of time")

    def facts(self) -> dict[str, Any]:
        return self._facts


def _fill(engine: _Engine, point: Point) -> _Decoding:
    """As many requests of the context as fit; bounded ones are as many at any context, and those that run go on."""
    if engine.bounded:
        return _Decoding(engine, replace(point, rows=len(engine.running), context=0))
    # None is to be preempted: room for blocks that are begun, and for the steps that are timed.
    fits = engine.pool_tokens // (point.context + _SPARE)
    return _Decoding(engine, replace(point, rows=min(fits, point.rows)))


def _shortest(engine: _Engine) -> int:
    return min(request.num_tokens for request in engine.running)


def _decoding(engine: _Engine) -> list[Any]:
    return [request for request in engine.running if request.num_output_tokens]


def _bytes_per_token(folder: str) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4


class VllmHost:
    """One engine, made when it is first asked for."""

    def __init__(self) -> None:
        os.environ |= SETTINGS
        found = installed()
        self.packages: tuple[str, ...] = (found.distribution if found else "vllm", "torch", "transformers")
        self._engine: _Engine | None = None

    def open(self, point: Point) -> _Decoding | _InFlight:
        """Bring the engine to a point."""
        self._engine = self._engine or _Engine(point)
        ways: dict[str, Callable[[_Engine, Point], _Decoding | _InFlight]]
        ways = {"": _Decoding, IN_FLIGHT: _InFlight, FULL: _fill}
        return ways[point.way](self._engine, point)


if __name__ == "__main__":
    serve(VllmHost())
