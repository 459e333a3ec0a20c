"""Stores with results that are easy to count."""

from longthink.lab.results.store import ResultStore
from tests.results.making import make_measurement, make_sample

TASKS = ("reasoner/m/chain", "reasoner/m/lookup", "gsm8k")
PROBLEMS = 10
DECODE_BUDGETS = (32, 64, 128)
BUDGETS = (64, 256)
RIGHT = {"dense": 9, "raas": 6, "raas:r=0.25": 5, "recency": 3}
"""How many of the problems of each task each policy solves, whatever the budget."""


def answers(policy: str, task: str, right: int, *, count: int = PROBLEMS, **changes):
    """Samples of one configuration: the first ``right`` problems are solved."""
    return [
        make_sample(
            policy=policy,
            task=task,
            problem=f"p{i}",
            correct=i < right,
            answer="7" if i < right else None,
            finish="stop" if i < right else "length",
            generated_tokens=100 + i,
            **changes,
        )
        for i in range(count)
    ]


def fill(folder, *, right=None) -> ResultStore:
    """Three tasks under Dense and three policies at three decode budgets, one of them at two budgets as well."""
    right = RIGHT | (right or {})
    store = ResultStore(folder)
    for task in TASKS:
        store.add(*answers("dense", task, right["dense"]))
        for policy in ("raas", "raas:r=0.25", "recency"):
            for budget in DECODE_BUDGETS:
                store.add(*answers(policy, task, right[policy], decode_budget=budget))
        for budget in BUDGETS:
            store.add(*answers("raas", task, right["raas"], budget=budget))
    return store


def measure(store: ResultStore) -> None:
    """Two systems, one of them at two budgets, at four lengths, for both kinds."""
    for kind in ("jct", "memory"):
        for system, budgets in (("raas", (128, 512)), ("hf dynamic", (None,))):
            for budget in budgets:
                store.add(
                    *(
                        make_measurement(
                            run=f"{kind}-{system}-{budget}",
                            kind=kind,
                            system=system,
                            decode_budget=budget,
                            decode_tokens=length,
                        )
                        for length in (256, 512, 1024, 2048)
                    )
                )
