"""The driver of a measurement of fidelity: what is missing in the store is measured, a few texts at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice, product
from typing import Any

from typing_extensions import override

from longthink.lab.evaluate.plan import CacheConfig
from longthink.lab.fidelity.plan import POLICIES_AT_ONCE, Group, Plan, Unit
from longthink.lab.fidelity.texts import Text
from longthink.lab.results.records import Fidelity, Record
from longthink.lab.results.store import ResultStore
from longthink.lab.work.driver import Driver, Identity, Tally


class FidelitySweep(Driver):
    """A unit is a few policies at one budget on a few texts, read side by side."""

    solver = "longthink.lab.fidelity.solver"
    noun = "measurements"

    def __init__(
        self,
        plan: Plan,
        texts: list[Text],
        store: ResultStore,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(plan, store, say)
        self.texts = texts

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(text.source for text in self.texts))

    @property
    def configs(self) -> list[str]:
        assert self.identity is not None
        return [
            self.plan.reading(cache, source, self.identity).config_hash
            for source in self.sources
            for cache in self.plan.caches
        ]

    @override
    def missing(self, identity: Identity) -> Iterator[Unit]:
        # Batches are of all texts, so that an interrupted run makes what an undisturbed one does.
        batches = [
            batch
            for _, texts in groupby(self.texts, key=lambda text: text.source)
            for batch in _batched(texts, self.plan.batch_size)
        ]
        done: dict[CacheConfig, set[tuple[str, str]]] = {}
        groups: dict[Group, list[CacheConfig]] = {}
        for cache in self.plan.caches:
            groups.setdefault(Group(cache.budget, cache.decode_budget), []).append(cache)
            done[cache] = {
                (source, name)
                for source in self.sources
                for (name,) in self.store.done(
                    Fidelity, self.plan.reading(cache, source, identity).config_hash
                )
            }
            stored = sum((text.source, text.id) in done[cache] for text in self.texts)
            self.tallies[cache] = Tally(total=len(self.texts), stored=stored)
        for (group, caches), batch in product(groups.items(), batches):
            lacking: dict[tuple[Text, ...], list[str]] = {}
            for cache in caches:
                texts = tuple(text for text in batch if (text.source, text.id) not in done[cache])
                lacking.setdefault(texts, []).append(cache.policy)
            for texts, policies in lacking.items():
                for part in _batched(policies if texts else (), POLICIES_AT_ONCE):
                    yield Unit(group=group, policies=part, texts=texts)

    @override
    def count(self, unit: Unit, records: list[Record]) -> None:
        for record in records:
            assert isinstance(record, Fidelity)
            self.tallies[CacheConfig(record.policy, record.budget, record.decode_budget)].made += 1


def _batched(values: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    rest = iter(values)
    while batch := tuple(islice(rest, size)):
        yield batch
