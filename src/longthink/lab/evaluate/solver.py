"""Making samples: a model decodes units, a grader judges the answers. As a program it is a worker process."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from typing_extensions import override

from longthink.hf import Engine, Finished, Request, Sampling
from longthink.lab.evaluate.facts import given_ids
from longthink.lab.evaluate.given import Given, decode_given
from longthink.lab.evaluate.grading import Grader
from longthink.lab.evaluate.plan import CacheConfig, Plan, Unit
from longthink.lab.evaluate.tasks import prompt_ids
from longthink.lab.results.records import Record, Sample, to_row
from longthink.lab.work.child import ModelSolver, serve_solver


class Solver(ModelSolver):
    plan_type, unit_type = Plan, Unit

    def __init__(self, plan: Plan, device: str | None = None) -> None:
        super().__init__(plan, device)
        self._sampling = Sampling(temperature=plan.temperature, top_p=plan.top_p, top_k=plan.top_k)
        self._grader = Grader()

    @override
    def __exit__(self, *exception: object) -> None:
        self._grader.close()

    @override
    def solve(self, group: Sequence[Any], units: Iterable[Unit]) -> Iterator[tuple[Unit, list[Record]]]:
        """Decode units of one cache (`CacheConfig`) in one batch; yield each as soon as it is finished."""
        cache = CacheConfig(*group)
        for is_given, run in itertools.groupby(units, key=lambda unit: unit.item.distance is not None):
            too_long: list[Request] = []
            decode = self._decode_given if is_given else self._decode
            for done in decode(cache, run, too_long):
                yield done.request.tag, [self._sample(done)]
            for request in too_long:
                yield request.tag, [self._sample(Finished(request=request, tokens=(), finish="no_room"))]

    def _decode(
        self, cache: CacheConfig, units: Iterable[Unit], too_long: list[Request]
    ) -> Iterator[Finished]:
        """Decode from the prompts on; append to `too_long` what the context of the model has no room for."""

        def requests() -> Iterator[Request]:
            for unit in units:
                request, has_room = self._request(unit, 0)
                if has_room:
                    yield request
                else:
                    too_long.append(request)

        with Engine(
            self.loaded.model, policy=cache.policy, budget=cache.budget, decode_budget=cache.decode_budget,
            seats=self.plan.batch_size, kv_dtype=self.plan.kv_dtype, kv_bits=self.plan.kv_bits,
        ) as engine:  # fmt: skip
            yield from engine.map(requests())

    def _decode_given(
        self, cache: CacheConfig, units: Iterable[Unit], too_long: list[Request]
    ) -> Iterator[Finished]:
        """The same behind texts that are given."""

        def texts() -> Iterator[Given]:
            for unit in units:
                assert unit.item.distance is not None
                text = tuple(given_ids(int(unit.item.id), unit.item.distance, self.loaded.tokenizer))
                request, has_room = self._request(unit, len(text))
                if has_room:
                    yield Given(request, text)
                else:
                    too_long.append(request)

        yield from decode_given(
            self.loaded.model, cache, texts(), self.plan.batch_size, kv_dtype=self.plan.kv_dtype,
            kv_bits=self.plan.kv_bits,
        )  # fmt: skip

    def _request(self, unit: Unit, given: int) -> tuple[Request, bool]:
        """Return the request of a unit, and whether the context has room for it behind so many `given` tokens."""
        tokens, limit = tuple(prompt_ids(unit.item, self.loaded.tokenizer)), unit.cell.max_new_tokens
        if self.loaded.context is not None:
            limit = min(limit, self.loaded.context - len(tokens) - given)
        request = Request(
            key=unit.key, tokens=tokens, max_new_tokens=max(1, limit), sampling=self._sampling, tag=unit
        )  # fmt: skip
        return request, limit >= 1

    def _sample(self, done: Finished) -> Sample:
        unit: Unit = done.request.tag
        text = self.loaded.tokenizer.decode(list(done.tokens), skip_special_tokens=True)
        verdict = self._grader.grade(unit.item, text)
        setup = self.plan.setup(unit.cell, self.identity)
        # After NaN or without room for the prompt there is no answer, whatever the text says.
        correct = verdict.correct and done.finish in ("stop", "length")
        return Sample(
            **to_row(setup), config=setup.config_hash, problem=unit.item.id, sample=unit.sample,
            prompt_tokens=len(done.request.tokens), generated_tokens=len(done.tokens), text=text,
            answer=verdict.answer, gold=unit.item.gold, correct=correct, finish=done.finish,
            ms_per_token_early=done.ms_per_token_early, ms_per_token_late=done.ms_per_token_late,
            seconds=done.seconds, rows=done.rows, kv_bytes_peak=done.kv_bytes_peak,
            dense_kv_bytes=done.dense_kv_bytes, evicted=done.evicted, **self.made_now(),
        )  # fmt: skip


if __name__ == "__main__":
    serve_solver(Solver)
