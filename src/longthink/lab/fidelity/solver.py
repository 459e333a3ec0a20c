"""Measuring fidelity with a loaded model. As a program it is a worker process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

from longthink.environment import hardware, versions
from longthink.hf import Engine, Request
from longthink.hf.forced import compiles
from longthink.lab.evaluate.plan import CacheConfig
from longthink.lab.evaluate.tasks import question_ids
from longthink.lab.fidelity.measure import Scores, measure
from longthink.lab.fidelity.plan import Group, Plan, Unit, budget_of
from longthink.lab.fidelity.texts import Encoded, Text
from longthink.lab.results.records import Fidelity, Record, to_row
from longthink.lab.work.child import serve_solver
from longthink.lab.work.driver import Identity
from longthink.models import load_model
from longthink.policies import make_policy


class Solver(AbstractContextManager["Solver"]):
    """The model of a plan in this process; `device` replaces the plan's."""

    plan_type, unit_type = Plan, Unit

    def __init__(self, plan: Plan, device: str | None = None) -> None:
        self.plan = plan
        place = device or plan.device
        self.loaded = load_model(plan.model, device=place, dtype=plan.dtype, revision=plan.revision)
        dtype = str(self.loaded.model.dtype).removeprefix("torch.")
        self.identity = Identity(revision=self.loaded.revision, dtype=dtype)
        self._encoded: dict[Text, Encoded] = {}
        self._versions, self._hardware = json.dumps(versions()), json.dumps(hardware())

    def __exit__(self, *exception: object) -> None:
        self._encoded.clear()

    def solve(self, group: Sequence[Any], units: Iterable[Unit]) -> Iterator[tuple[Unit, list[Record]]]:
        """Measure units of one budget; yield each as soon as it is finished."""
        budget = budget_of(Group(*group))
        for unit in units:
            started = time.monotonic()
            texts = self._encode(unit.texts)
            policies = [make_policy(spec) for spec in unit.policies]
            tokens = max(len(text.decoded) for text in texts)
            found = measure(
                self.loaded.model, texts, policies, budget, compile=compiles(self.loaded.model, tokens)
            )
            seconds = (time.monotonic() - started) / (len(texts) * len(policies))
            yield (
                unit,
                [
                    self._record(unit, spec, (text, encoded), scores, seconds)
                    for spec, column in zip(unit.policies, found, strict=True)
                    for text, encoded, scores in zip(unit.texts, texts, column, strict=True)
                ],
            )

    def _record(
        self, unit: Unit, policy: str, text: tuple[Text, Encoded], scores: Scores, seconds: float
    ) -> Fidelity:
        name, encoded = text
        reading = self.plan.reading(CacheConfig(policy, *unit.group), name.source, self.identity)
        return Fidelity(
            **to_row(reading), config=reading.config_hash, text=name.id, prompt_tokens=len(encoded.prompt),
            decoded_tokens=len(encoded.decoded), **scores._asdict(), seconds=seconds, versions=self._versions,
            hardware=self._hardware, created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )  # fmt: skip

    def _encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Tokens of the texts; those that are the model's own answers are made first, with a dense cache."""
        tokenizer = self.loaded.tokenizer
        asked = [text for text in texts if text.body is None and text not in self._encoded]
        if asked:
            prompts = {text: tuple(_prompt_ids(text, tokenizer)) for text in asked}
            with Engine(self.loaded.model, policy="dense", seats=len(asked)) as engine:
                requests = (
                    Request(key=text.id, tokens=prompts[text], max_new_tokens=text.limit or 1, tag=text)
                    for text in asked
                )
                for done in engine.map(requests):
                    self._encoded[done.request.tag] = Encoded(prompts[done.request.tag], done.tokens)
        for text in texts:
            if text not in self._encoded:
                self._encoded[text] = encode(text, tokenizer, self.plan.max_tokens)
        return [self._cut(self._encoded[text]) for text in texts]

    def _cut(self, text: Encoded) -> Encoded:
        """The text as far as the model's context goes."""
        if self.loaded.context is None:
            return text
        return Encoded(text.prompt, text.decoded[: max(0, self.loaded.context - len(text.prompt))])


def encode(text: Text, tokenizer: Any, max_tokens: int | None) -> Encoded:
    """Tokens of a text that is given. Plain text has its first token for a prompt."""
    if text.question is None:
        first, *rest = tokenizer(text.body)["input_ids"]
        return Encoded((first,), tuple(rest[:max_tokens]))
    body = tokenizer(text.body, add_special_tokens=False)["input_ids"]
    return Encoded(tuple(_prompt_ids(text, tokenizer)), tuple(body[:max_tokens]))


def _prompt_ids(text: Text, tokenizer: Any) -> list[int]:
    assert text.question is not None
    if text.builtin:
        ids: list[int] = tokenizer(text.question)["input_ids"]
        return ids
    return question_ids(text.question, tokenizer)


if __name__ == "__main__":
    serve_solver(Solver)
