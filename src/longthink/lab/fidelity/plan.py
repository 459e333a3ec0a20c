"""What a measurement of fidelity is asked to do: policies at budgets over texts, and the units of work in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from longthink.config import DEFAULT_POLICY, Budget, KvBits, check_choice, check_int
from longthink.lab.evaluate.plan import CacheConfig, budgets_for, check_format
from longthink.lab.evaluate.tasks import load_tasks
from longthink.lab.fidelity.measure import LOST, SURE
from longthink.lab.fidelity.texts import Text, read_texts
from longthink.lab.results.records import Reading
from longthink.lab.work.driver import Identity
from longthink.models import REASONER
from longthink.policies import make_policy, policy_to_dict

ROWS = 4  # texts read side by side
POLICIES_AT_ONCE = 8  # beside one dense model


class Group(NamedTuple):
    """A budget: units of the same budget run the same compiled steps."""

    budget: int | None
    decode_budget: int | None


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Some policies at one budget on a few texts."""

    group: Group
    policies: tuple[str, ...]
    texts: tuple[Text, ...]

    @property
    def key(self) -> str:
        return f"{', '.join(text.id for text in self.texts)} at {budget_of(self.group) or 'no budget'}"

    def to_json(self) -> list[Any]:
        return [list(self.group), list(self.policies), [asdict(text) for text in self.texts]]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Self:
        group, policies, texts = values
        return cls(group=Group(*group), policies=tuple(policies), texts=tuple(Text(**text) for text in texts))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every policy at every budget on every text; `BudgetError` if a policy has none, or too small a one."""

    model: str = REASONER
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    data: tuple[str, ...] = ()  # files of texts
    tasks: tuple[str, ...] = ()  # problem sets, whose dense greedy answers are the texts
    count: int | None = None  # texts per file or task
    max_tokens: int | None = None  # texts are cut there, without the prompt
    policies: tuple[str, ...] = (DEFAULT_POLICY, "raas", "recency")
    budgets: tuple[int, ...] = ()
    decode_budgets: tuple[int, ...] = ()
    rows: int | None = None  # texts side by side; None for `ROWS`
    kv_dtype: str | None = None  # format of keys and values; None for the model's
    kv_bits: str | None = None  # bits of packed pages; None if none are

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        if not self.policies:
            raise ValueError("policies is empty: name at least one")
        if bool(self.data) == bool(self.tasks):
            raise ValueError("give data (files of texts) or tasks (whose answers by the model are the texts)")
        for name in ("count", "max_tokens", "rows"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        check_format(self.kv_dtype, self.kv_bits, self.policies)
        _ = self.caches

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)

    @property
    def batch_size(self) -> int:
        return self.rows or ROWS

    @cached_property
    def caches(self) -> list[CacheConfig]:
        found = [
            CacheConfig.of(policy, budget)
            for policy in map(make_policy, self.policies)
            for budget in budgets_for(policy, self.budgets, self.decode_budgets)
        ]
        return list(dict.fromkeys(found))

    def load_texts(self) -> list[Text]:
        """Return the texts, those of about the same length side by side; answers are still to be made."""
        if self.data:
            texts = read_texts([Path(path).expanduser() for path in self.data], self.count)
            return sorted(texts, key=lambda text: (text.source, len(text.body or "")))
        return [
            Text(source=f"answers of {task.name}", id=item.id, question=item.question, body=None,
                 builtin=item.is_builtin, limit=min(self.max_tokens or task.max_new_tokens, task.max_new_tokens))
            for task in load_tasks(self.tasks, count=self.count)
            for item in task.items
        ]  # fmt: skip

    def reading(self, cache: CacheConfig, source: str, identity: Identity) -> Reading:
        return Reading(
            model=self.model, revision=identity.revision, dtype=identity.dtype, policy=cache.policy,
            switches=json.dumps(policy_to_dict(make_policy(cache.policy)), sort_keys=True), budget=cache.budget,
            decode_budget=cache.decode_budget, source=source, max_tokens=self.max_tokens, sure=SURE, lost=LOST,
            kv_dtype=self.kv_dtype, kv_bits=KvBits.shortest(self.kv_bits),
        )  # fmt: skip


def budget_of(group: Group) -> Budget | None:
    return None if group == (None, None) else Budget(budget=group[0], decode_budget=group[1])
