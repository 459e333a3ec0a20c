"""What a sweep is asked to do: the cells of models, tasks, policies, budgets and seeds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from longthink.config import Budget, check_choice, check_int, check_sampling
from longthink.errors import BudgetError
from longthink.lab.evaluate.tasks import Item, Task, load_tasks
from longthink.lab.results.records import Setup
from longthink.models import REASONER
from longthink.policies import Policy, make_policy, needs_budget, policy_spec, policy_to_dict

BUILTIN_ROWS = 32
"""Rows side by side for the built-in model: so small a model gains from many."""
ROWS = 8
"""Rows side by side for other models."""


class Identity(NamedTuple):
    """What is known of a model only when it has been loaded, and belongs to a setup."""

    revision: str | None
    dtype: str


class Lane(NamedTuple):
    """Samples that may decode side by side: one policy at one budget."""

    policy: str
    budget: int | None
    decode_budget: int | None

    @property
    def kept(self) -> Budget | None:
        """The budget, or None where everything is kept."""
        if self.budget is None and self.decode_budget is None:
            return None
        return Budget(budget=self.budget, decode_budget=self.decode_budget)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration: all its samples have the same setup.

    Attributes
    ----------
    policy
        Text of the policy as asked for.
    lane
        Its policy with the seed filled in, and its budget.
    """

    policy: str
    lane: Lane
    task: str
    grading: Literal["math", "exact"]
    max_new_tokens: int
    seed: int


class Unit(NamedTuple):
    """One sample to make."""

    cell: Cell
    item: Item
    sample: int

    @property
    def key(self) -> str:
        """What its randomness depends on, and nothing else does."""
        return f"{self.cell.seed}/{self.cell.task}/{self.item.id}/{self.sample}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep: every policy at every budget on every task.

    Parameters
    ----------
    model, revision, device, dtype
        See `longthink.models.load_model`.
    tasks, data, count, choose, seed
        See `longthink.lab.evaluate.tasks.load_tasks`.
    policies
        Policies, as texts such as ``raas:r=0.25``. Those that keep everything are run once, without a budget.
    budgets, decode_budgets
        Tokens kept per layer: in all, or on top of the prompt. Both may be given; all are run.
    sampling_seeds
        Seeds of sampling and of random policies. What has no randomness is run with the first one only.
    samples
        Samples of each problem and seed; more than one needs a temperature.
    temperature, top_p, top_k
        How tokens are chosen; temperature 0 is greedy.
    max_new_tokens
        Tokens of an answer at most; None for each task's own limit.
    rows
        Samples decoded side by side in each process; None for 32 with the built-in model and 8 with others.

    Raises
    ------
    ValueError
        If a value is out of range; nothing has been loaded then.
    BudgetError
        If a policy needs a budget and there is none, or not even a prompt of one token fits.
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
    budgets: tuple[int, ...] = ()
    decode_budgets: tuple[int, ...] = ()
    sampling_seeds: tuple[int, ...] = (0,)
    samples: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        check_sampling(self.temperature, self.top_p, self.top_k)
        check_int("samples", self.samples, 1)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} needs a temperature above 0: greedy samples are all the same"
            )
        for name in ("max_new_tokens", "rows"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        for name in ("policies", "sampling_seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one")
        for seed in self.sampling_seeds:
            check_int("sampling_seeds", seed, 0, (1 << 62) - 1)
        _ = self.lanes

    @property
    def rows_or_default(self) -> int:
        """Samples decoded side by side in each process."""
        return self.rows or (BUILTIN_ROWS if self.model == REASONER else ROWS)

    @cached_property
    def lanes(self) -> list[tuple[str, int, Lane]]:
        """Policy as asked for, seed and lane of all cells of a task."""
        found = []
        for text in dict.fromkeys(self.policies):
            policy = make_policy(text)
            for budget in self._budgets(policy):
                for seed in self.sampling_seeds:
                    if seed != self.sampling_seeds[0] and not self._is_random(policy):
                        continue
                    found.append((policy_spec(policy), seed, _lane(policy, budget, seed)))
        return list(dict.fromkeys(found))

    def _is_random(self, policy: Policy) -> bool:
        return self.temperature > 0 or hasattr(policy, "seed")

    def _budgets(self, policy: Policy) -> list[Budget | None]:
        if not needs_budget(policy):
            return [None]
        budgets = [Budget(budget=value) for value in self.budgets]
        budgets += [Budget(decode_budget=value) for value in self.decode_budgets]
        if not budgets:
            raise BudgetError(
                f"policy {policy_spec(policy)!r} needs a budget: give budgets or decode_budgets"
            )
        for budget in budgets:
            required = policy.required_pages(1)
            if budget.pages(1, policy.page_size) < required:
                raise BudgetError(
                    f"{budget} is too small for policy {policy_spec(policy)!r} with any prompt: allowed is >= "
                    f"{required * policy.page_size}"
                )
        return list(budgets)

    def load_tasks(self) -> list[Task]:
        """Load the problem sets; see `longthink.lab.evaluate.tasks.load_tasks`."""
        from pathlib import Path

        return load_tasks(
            self.tasks,
            data=[Path(path).expanduser() for path in self.data],
            count=self.count,
            choose=self.choose,
            seed=self.seed,
        )

    def cells(self, tasks: Sequence[Task]) -> list[tuple[Cell, Task]]:
        """Return all configurations, in the order in which they are run."""
        return [
            (
                Cell(
                    policy=policy,
                    lane=lane,
                    task=task.name,
                    grading=task.grading,
                    max_new_tokens=self.max_new_tokens or task.max_new_tokens,
                    seed=seed,
                ),
                task,
            )
            for policy, seed, lane in self.lanes
            for task in tasks
        ]

    def setup(self, cell: Cell, identity: Identity) -> Setup:
        """Return what a cell's samples are measured under, once the model is known."""
        return Setup(
            model=self.model,
            revision=identity.revision,
            dtype=identity.dtype,
            policy=cell.policy,
            switches=json.dumps(policy_to_dict(make_policy(cell.lane.policy)), sort_keys=True),
            budget=cell.lane.budget,
            decode_budget=cell.lane.decode_budget,
            task=cell.task,
            seed=cell.seed,
            temperature=float(self.temperature),
            top_p=None if self.top_p is None else float(self.top_p),
            top_k=self.top_k,
            max_new_tokens=cell.max_new_tokens,
        )


def _lane(policy: Policy, budget: Budget | None, seed: int) -> Lane:
    """Lane of a policy; its own seed counts from the seed of the cell."""
    if hasattr(policy, "seed"):
        policy = dataclasses.replace(policy, seed=policy.seed + seed)  # type: ignore[call-arg]
    if budget is None:
        return Lane(policy_spec(policy), None, None)
    return Lane(policy_spec(policy), budget.budget, budget.decode_budget)
