"""Measuring fidelity with a loaded model. As a program it is a worker process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from typing_extensions import override

from longthink.hf import Engine, Request
from longthink.lab.evaluate.plan import CacheConfig
from longthink.lab.evaluate.tasks import question_ids
from longthink.lab.fidelity.measure import Scores, measure
from longthink.lab.fidelity.plan import Group, Plan, Unit, budget_of
from longthink.lab.fidelity.texts import Encoded, Text
from longthink.lab.results.records import Fidelity, Record, to_row
from longthink.lab.work.child import ModelSolver, serve_solver
from longthink.policies import make_policy


class Solver(ModelSolver):
    plan_type, unit_type = Plan, Unit

    def __init__(self, plan: Plan, device: str | None = None) -> None:
        super().__init__(plan, device)
        self._encoded: dict[Text, Encoded] = {}

    @override
    def solve(self, group: Sequence[Any], units: Iterable[Unit]) -> Iterator[tuple[Unit, list[Record]]]:
        """Measure units of one budget; yield each as soon as it is finished."""
        budget = budget_of(Group(*group))
        for unit in units:
            started = time.monotonic()
            texts = self._encode(unit.texts)
            policies = [make_policy(spec) for spec in unit.policies]
            found = measure(
                self.loaded.model,
                texts,
                policies,
                budget,
                kv_dtype=self.plan.kv_dtype,
                kv_bits=self.plan.kv_bits,
            )
            seconds = (time.monotonic() - started) / (len(texts) * len(policies))
            records: list[Record] = [
                self._record(unit, spec, (text, encoded), scores, seconds)
                for spec, column in zip(unit.policies, found, strict=True)
                for text, encoded, scores in zip(unit.texts, texts, column, strict=True)
            ]
            yield unit, records

    def _record(
        self, unit: Unit, policy: str, text: tuple[Text, Encoded], scores: Scores, seconds: float
    ) -> Fidelity:
        name, encoded = text
        reading = self.plan.reading(CacheConfig(policy, *unit.group), name.source, self.identity)
        return Fidelity(
            **to_row(reading), config=reading.config_hash, text=name.id, prompt_tokens=len(encoded.prompt),
            decoded_tokens=len(encoded.decoded), **scores._asdict(), seconds=seconds, **self.made_now(),
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
