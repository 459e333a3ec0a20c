"""What a sweep is asked to do: the cells of tasks, policies, budgets and seeds, and the units of work in them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from longthink.cache import with_pages
from longthink.config import KV_DTYPES, Budget, KvBits, check_choice, check_int, check_sampling
from longthink.errors import BudgetError
from longthink.lab.evaluate.files import Item
from longthink.lab.evaluate.tasks import Task, load_tasks
from longthink.lab.results.records import Setup
from longthink.lab.work.driver import Identity
from longthink.models import REASONER
from longthink.policies import Policy, make_policy, needs_budget, policy_spec, policy_to_dict

BUILTIN_ROWS = 32  # the built-in model is so small that it gains from many rows
ROWS = 8  # default batch size for other models


class CacheConfig(NamedTuple):
    """One policy at one budget. Samples with the same cache can be decoded in one batch."""

    policy: str
    budget: int | None
    decode_budget: int | None

    @classmethod
    def of(cls, policy: Policy, budget: Budget | None) -> Self:
        bounds = (None, None) if budget is None else (budget.budget, budget.decode_budget)
        return cls(policy_spec(policy), *bounds)


@dataclass(frozen=True, kw_only=True)
class Cell:
    policy: str  # as requested
    cache: CacheConfig  # with the seed filled in
    task: str
    max_new_tokens: int
    seed: int


class Unit(NamedTuple):
    cell: Cell
    item: Item
    sample: int

    @property
    def group(self) -> CacheConfig:
        return self.cell.cache

    @property
    def key(self) -> str:
        """Seed of the sample's random generator; it depends on nothing else."""
        return f"{self.cell.seed}/{self.cell.task}/{self.item.id}/{self.sample}"

    def to_json(self) -> list[Any]:
        return [asdict(self.cell), asdict(self.item), self.sample]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Self:
        cell, item, sample = values
        return cls(Cell(**cell | {"cache": CacheConfig(*cell["cache"])}), Item(**item), sample)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every policy at every budget on every task; `BudgetError` if a policy has none, or too small a one.

    Policies that keep everything run once, and anything deterministic with the first of the `sampling_seeds` only.
    """

    model: str = REASONER
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    tasks: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    count: int | None = None
    choose: str = "first"
    seed: int = 0
    policies: tuple[str, ...] = ("dense",)
    budgets: tuple[int, ...] = ()  # tokens kept per layer
    decode_budgets: tuple[int, ...] = ()  # the same on top of the prompt
    sampling_seeds: tuple[int, ...] = (0,)  # of sampling and of random policies
    samples: int = 1  # per problem and seed
    temperature: float = 0.0  # 0 is greedy
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None  # None for each task's own
    rows: int | None = None  # batch size of each process; None for `BUILTIN_ROWS` or `ROWS`
    kv_dtype: str | None = None  # format of keys and values; None for the model's
    kv_bits: str | None = None  # bits of packed pages; None if none are

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        check_sampling(self.temperature, self.top_p, self.top_k)
        check_int("samples", self.samples, 1)
        if self.samples > 1 and self.temperature == 0:
            fault = "needs a temperature above 0: greedy samples are identical"
            raise ValueError(f"samples={self.samples} {fault}")
        for name in ("max_new_tokens", "rows"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        for name in ("policies", "sampling_seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one")
        for seed in self.sampling_seeds:
            check_int("sampling_seeds", seed, 0, (1 << 62) - 1)
        check_format(self.kv_dtype, self.kv_bits, self.policies)
        _ = self.caches

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)

    @property
    def batch_size(self) -> int:
        return self.rows or (BUILTIN_ROWS if self.model == REASONER else ROWS)

    @cached_property
    def caches(self) -> list[tuple[str, int, CacheConfig]]:
        found = []
        for text in dict.fromkeys(self.policies):
            policy = make_policy(text)
            is_random = self.temperature > 0 or hasattr(policy, "seed")
            for budget in budgets_for(policy, self.budgets, self.decode_budgets):
                for seed in self.sampling_seeds if is_random else self.sampling_seeds[:1]:
                    found.append((policy_spec(policy), seed, _cache(policy, budget, seed)))
        return list(dict.fromkeys(found))

    def load_tasks(self) -> list[Task]:
        data = [Path(path).expanduser() for path in self.data]
        return load_tasks(
            self.tasks, data=data, count=self.count, choose=self.choose, seed=self.seed, given=True
        )

    def cells(self, tasks: Sequence[Task]) -> list[tuple[Cell, Task]]:
        return [
            (Cell(policy=policy, cache=cache, task=task.name, seed=seed,
                  max_new_tokens=self.max_new_tokens or task.max_new_tokens), task)
            for policy, seed, cache in self.caches
            for task in tasks
        ]  # fmt: skip

    def setup(self, cell: Cell, identity: Identity) -> Setup:
        return Setup(
            model=self.model, revision=identity.revision, dtype=identity.dtype, policy=cell.policy,
            switches=json.dumps(policy_to_dict(make_policy(cell.cache.policy)), sort_keys=True),
            budget=cell.cache.budget, decode_budget=cell.cache.decode_budget, task=cell.task, seed=cell.seed,
            temperature=float(self.temperature), top_p=None if self.top_p is None else float(self.top_p),
            top_k=self.top_k, max_new_tokens=cell.max_new_tokens, kv_dtype=self.kv_dtype,
            kv_bits=KvBits.shortest(self.kv_bits),
        )  # fmt: skip


def check_format(kv_dtype: str | None, kv_bits: str | None, policies: Iterable[str | Policy]) -> None:
    """Raise `ValueError` for a format that is unknown, `UnsupportedFeatureError` if a policy cannot be packed."""
    if kv_dtype is not None:
        check_choice("kv_dtype", kv_dtype, KV_DTYPES)
    if (bits := KvBits.parse(kv_bits)) is not None:
        for policy in policies:
            with_pages(make_policy(policy), bits)


def budgets_for(policy: Policy, budgets: Sequence[int], decode_budgets: Sequence[int]) -> list[Budget | None]:
    """Budgets to run a policy at; `BudgetError` if it needs one and there is none, or one is too small."""
    if not needs_budget(policy):
        return [None]
    found = [Budget(budget=value) for value in budgets]
    found += [Budget(decode_budget=value) for value in decode_budgets]
    name, required = policy_spec(policy), policy.required_pages(1)
    if not found:
        raise BudgetError(f"policy {name!r} needs a budget: give budgets or decode_budgets")
    for budget in found:
        if budget.pages(1, policy.page_size) < required:
            allowed = f">= {required * policy.page_size}"
            raise BudgetError(
                f"{budget} is too small for policy {name!r} with any prompt: allowed is {allowed}"
            )
    return list(found)


def _cache(policy: Policy, budget: Budget | None, seed: int) -> CacheConfig:
    """Return the cache of a cell; a random policy's own seed counts from the cell's."""
    if hasattr(policy, "seed"):
        policy = replace(policy, seed=policy.seed + seed)  # type: ignore[call-arg]
    return CacheConfig.of(policy, budget)
