"""Making samples: a model decodes units, a grader judges the answers. As a program a worker of `ProcessWorkers`."""

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime

import torch

from longthink.environment import hardware, versions
from longthink.hf import Engine, Finished, Request, Sampling
from longthink.lab.evaluate.grading import Grader
from longthink.lab.evaluate.plan import CacheConfig, Identity, Plan, Unit
from longthink.lab.evaluate.tasks import prompt_ids
from longthink.lab.processes import Parent, serve
from longthink.lab.results.records import Sample, to_row
from longthink.models import load_model


class Solver(AbstractContextManager["Solver"]):
    """The model of a plan in this process; `device` replaces the plan's. Use it in a ``with`` block."""

    def __init__(self, plan: Plan, device: str | None = None) -> None:
        self.plan = plan
        place = device or plan.device
        self.loaded = load_model(plan.model, device=place, dtype=plan.dtype, revision=plan.revision)
        dtype = str(self.loaded.model.dtype).removeprefix("torch.")
        self.identity = Identity(revision=self.loaded.revision, dtype=dtype)
        self._sampling = Sampling(temperature=plan.temperature, top_p=plan.top_p, top_k=plan.top_k)
        self._grader = Grader()
        self._versions, self._hardware = json.dumps(versions()), json.dumps(hardware())

    def __exit__(self, *exception: object) -> None:
        self._grader.close()

    def solve(self, cache: CacheConfig, units: Iterable[Unit]) -> Iterator[tuple[Unit, Sample]]:
        """Decode units in one batch; yield each with its sample as soon as it is finished."""
        too_long: list[Request] = []

        def requests() -> Iterator[Request]:
            for unit in units:
                tokens, limit = tuple(prompt_ids(unit.item, self.loaded.tokenizer)), unit.cell.max_new_tokens
                if self.loaded.context is not None:
                    limit = min(limit, self.loaded.context - len(tokens))
                request = Request(
                    key=unit.key, tokens=tokens, max_new_tokens=max(1, limit), sampling=self._sampling, tag=unit
                )  # fmt: skip
                if limit >= 1:
                    yield request
                else:
                    too_long.append(request)

        with Engine(
            self.loaded.model, policy=cache.policy, budget=cache.budget, decode_budget=cache.decode_budget,
            seats=self.plan.batch_size,
        ) as engine:  # fmt: skip
            for done in engine.map(requests()):
                yield done.request.tag, self._sample(done)
        for request in too_long:
            yield request.tag, self._sample(Finished(request=request, tokens=(), finish="no_room"))

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
            dense_kv_bytes=done.dense_kv_bytes, evicted=done.evicted, versions=self._versions,
            hardware=self._hardware, created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )  # fmt: skip


def _work(parent: Parent) -> None:
    values, number = parent.receive()
    plan, count = Plan.from_json(values), torch.cuda.device_count()
    device = f"cuda:{number % count}" if plan.device == "auto" and count else plan.device
    numbers: dict[Unit, int] = {}

    def units() -> Iterator[Unit]:
        while True:
            parent.send(["take"])
            if (taken := parent.receive()) is None:
                return
            unit = Unit.from_json(taken[1])
            numbers[unit] = taken[0]
            yield unit

    with Solver(plan, device) as solver:
        parent.send(["begin", *solver.identity])
        while True:
            parent.send(["idle"])
            for unit, sample in solver.solve(CacheConfig(*parent.receive()), units()):
                parent.send(["finish", numbers.pop(unit), to_row(sample)])


if __name__ == "__main__":
    serve(_work)
