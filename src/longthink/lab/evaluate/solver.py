"""Making samples: a loaded model, a stream of units, and the rows that come of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from longthink.environment import hardware, versions
from longthink.hf import Engine, Finished, Request, Sampling
from longthink.lab.evaluate.grading import Grader
from longthink.lab.evaluate.plan import Identity, Lane, Plan, Unit
from longthink.lab.evaluate.tasks import Task
from longthink.lab.results.records import Sample, Setup, to_row
from longthink.models import load_model


class Solver:
    """A model in this process, ready to make samples. Use it in a ``with`` block.

    Parameters
    ----------
    plan
        Says which model, and how tokens are chosen.
    device
        Device in place of the plan's, where processes share several.
    """

    def __init__(self, plan: Plan, device: str | None = None) -> None:
        self.plan = plan
        self.loaded = load_model(
            plan.model, device=device or plan.device, dtype=plan.dtype, revision=plan.revision
        )
        dtype = str(self.loaded.model.dtype).removeprefix("torch.")
        self.identity = Identity(revision=self.loaded.revision, dtype=dtype)
        self._sampling = Sampling(temperature=plan.temperature, top_p=plan.top_p, top_k=plan.top_k)
        self._grader = Grader()
        self._versions = json.dumps(versions())
        self._hardware = json.dumps(hardware())

    def __enter__(self) -> Solver:
        return self

    def __exit__(self, *exception: object) -> None:
        self._grader.close()

    def solve(self, lane: Lane, units: Iterable[Unit]) -> Iterator[tuple[Unit, Sample]]:
        """Decode the units of one lane side by side; yield each with its row as soon as it is complete."""
        plan = self.plan
        # Prompts that the model's context cannot hold never reach the stream.
        beyond: list[Unit] = []

        def requests() -> Iterator[Request]:
            for unit in units:
                request = self._request(unit)
                if request is None:
                    beyond.append(unit)
                else:
                    yield request

        kept = {} if lane.kept is None else asdict(lane.kept)
        with Engine(self.loaded.model, policy=lane.policy, seats=plan.rows_or_default, **kept) as engine:
            for done in engine.map(requests()):
                yield done.request.tag, self._sample(done)
        for unit in beyond:
            tokens = tuple(self._prompt_ids(unit))
            request = Request(key=unit.key, tokens=tokens, max_new_tokens=1, tag=unit)
            yield unit, self._sample(Finished(request=request, tokens=(), finish="no_room"))

    def _prompt_ids(self, unit: Unit) -> list[int]:
        cell = unit.cell
        task = Task(name=cell.task, items=(), max_new_tokens=cell.max_new_tokens, grading=cell.grading)
        return task.prompt_ids(unit.item, self.loaded.tokenizer)

    def _request(self, unit: Unit) -> Request | None:
        """Return the request of a unit, cut to the model's context, or None where the prompt fills it."""
        tokens = self._prompt_ids(unit)
        limit = unit.cell.max_new_tokens
        if self.loaded.context is not None:
            limit = min(limit, self.loaded.context - len(tokens))
        if limit < 1:
            return None
        return Request(
            key=unit.key, tokens=tuple(tokens), max_new_tokens=limit, sampling=self._sampling, tag=unit
        )

    def _sample(self, done: Finished) -> Sample:
        unit: Unit = done.request.tag
        text = self.loaded.tokenizer.decode(list(done.tokens), skip_special_tokens=True)
        verdict = self._grader.grade(unit.item, text, exact=unit.cell.grading == "exact")
        setup: Setup = self.plan.setup(unit.cell, self.identity)
        fields: dict[str, Any] = to_row(setup)  # type: ignore[arg-type]
        return Sample(
            **fields,
            config=setup.config_hash,
            problem=unit.item.id,
            sample=unit.sample,
            prompt_tokens=len(done.request.tokens),
            generated_tokens=len(done.tokens),
            text=text,
            answer=verdict.answer,
            gold=unit.item.gold,
            # Numbers that broke give no answer, whatever stood there before.
            correct=verdict.correct and done.finish in ("stop", "length"),
            finish=done.finish,
            ms_per_token_early=done.ms_per_token_early,
            ms_per_token_late=done.ms_per_token_late,
            seconds=done.seconds,
            rows=done.rows,
            kv_bytes_peak=done.kv_bytes_peak,
            dense_kv_bytes=done.dense_kv_bytes,
            evicted=done.evicted,
            versions=self._versions,
            hardware=self._hardware,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
