"""``longthink bench``: time per token and memory against decode length."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from longthink.cli.app import PASSIVE
from longthink.cli.errors import EXIT_INTERRUPTED
from longthink.cli.options import BudgetOptions, ModelOptions, Switch, policy_specs, words
from longthink.cli.progress import Task, progress
from longthink.cli.terminal import note, write_json
from longthink.config import Budget
from longthink.environment import hardware, versions
from longthink.lab.bench.models import RANDOM
from longthink.lab.bench.plan import BASELINES, Plan, Report

if TYPE_CHECKING:
    from longthink.lab.results.records import Measurement
    from longthink.lab.results.store import ResultStore

bench_app = App(
    name="bench",
    help="Time and memory of the caches, beside the dense ones of transformers.",
    suppress_keyboard_interrupt=False,
)

DEFAULT_BUDGET = 1024


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BenchOptions(BudgetOptions, ModelOptions):
    model: str = RANDOM
    """Hub id or folder of a model, "reasoner", or a random model: random: and its shape."""
    # A merged adapter costs no time and no memory.
    adapter: Annotated[str | None, Parameter(parse=False)] = None
    policies: str = "dense,raas,quest,h2o,streaming_llm,recency,random"
    """Policies to measure, separated by commas; options after colons, such as raas:r=0.25."""
    baselines: str = ",".join(BASELINES)
    """Dense caches of transformers to compare with, separated by commas."""
    lengths: str = "1024,2048,4096,8192,16384,32768"
    """Decoded tokens at which to measure, separated by commas."""
    fast_forward: bool = True
    """Fill the caches with random data up to each length instead of decoding."""
    kv_dtype: str | None = None
    """Number format of keys and values under a policy: bfloat16, float16 or float32 [default: the model's own]."""
    prompt: int = 128
    """Tokens of each prompt; they are random."""
    rows: int = 1
    """Batch size."""
    threads: int = 1
    """CPU threads."""
    out: str | None = None
    """Result store to add the rows to; "longthink report" draws it."""
    json: Switch = False
    """Print one JSON document instead of the tables."""

    def plan(self, **more: Any) -> Plan:
        policies = policy_specs(self.policies) if self.policies else []
        return Plan(
            model=self.model, device=self.device, dtype=self.dtype, policies=tuple(dict.fromkeys(policies)),
            baselines=tuple(dict.fromkeys(words(self.baselines))),
            budget=Budget(**(self.given_budget or {"budget": DEFAULT_BUDGET})),
            lengths=integers("lengths", self.lengths), prompt=self.prompt, rows=self.rows,
            threads=self.threads, kv_dtype=self.kv_dtype, fast_forward=self.fast_forward, **more,
        )  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class JctOptions(BenchOptions):
    repeats: int = 5
    """Timed blocks of 32 steps of each cache at each length."""
    compile: Switch = False
    """Measure each policy with a compiled decode step as well."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class MemoryOptions(BenchOptions):
    baselines: str = "dynamic,static"
    lengths: str = "512,1024,2048"
    fast_forward: bool = False


_JCT, _MEMORY = JctOptions(), MemoryOptions()


@bench_app.command
def jct(*, options: JctOptions = _JCT) -> int:
    """Measure time per token and job completion time against decode length.

    All caches take turns in one process: CPU time on a CPU, wall-clock time elsewhere. Compile time is not counted.
    The budget is 1024 unless one is given.
    """
    plan = options.plan(repeats=options.repeats, compile=options.compile)
    store = store_for(options.out)
    with progress(f"loading {plan.model}"):
        from longthink.lab.bench.models import bench_model

        loaded = bench_model(plan.model, device=plan.device, dtype=plan.dtype)
    from longthink.lab.bench.jct import blocks_in_all, measure_jct

    work = progress("measuring", total=blocks_in_all(plan), unit="blocks")
    return _run(partial(measure_jct, plan, loaded), work, plan, store, options)


@bench_app.command
def memory(*, options: MemoryOptions = _MEMORY) -> int:
    """Measure the bytes of the cache and of the process against decode length.

    Each cache decodes in a process of its own. The budget is 1024 unless one is given.
    """
    plan = options.plan()
    store = store_for(options.out)
    from longthink.lab.bench.memory import measure_memory

    total = (len(plan.lengths) + 1) * (len(plan.policies) + len(plan.baselines))
    work = progress("measuring", total=total, unit="rows")
    return _run(partial(measure_memory, plan), work, plan, store, options)


def _run(
    measure: Callable[[Report], Iterator[Measurement]], work: AbstractContextManager[Task], plan: Plan,
    store: ResultStore | None, options: BenchOptions,
) -> int:  # fmt: skip
    rows: list[Measurement] = []
    setup = {"budget": str(plan.budget), "threads": plan.threads, "fast_forwarded": plan.fast_forward}
    setup |= conditions()
    code = 0
    try:
        with work as task:
            for row in measure(task.advance_to):
                rows.append(row)
                if store is not None:
                    store.add(row)
    except KeyboardInterrupt:
        kept = f" and are in {options.out}" if options.out is not None else ""
        note(f"interrupted: {len(rows)} rows were measured{kept}")
        code = EXIT_INTERRUPTED
    setup["load_after"] = load()
    if options.json:
        from longthink.lab.results.records import to_row

        write_json({"conditions": setup, "rows": [to_row(row) for row in rows]})
    elif rows:
        from longthink.lab.cli.tables import print_measurements

        print_measurements(rows, setup)
    return code


def store_for(place: str | None) -> ResultStore | None:
    """Open the store before anything is measured, so that a bad folder costs no time."""
    if place is None:
        return None
    from longthink.lab.results.object_store import open_store

    return open_store(place)


def conditions() -> dict[str, Any]:
    waits = {name: os.environ.get(name) for name in PASSIVE}
    return waits | {"versions": versions(), "hardware": hardware(), "load_before": load()}


def load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def integers(field: str, text: str) -> tuple[int, ...]:
    numbers = []
    for word in words(text):
        try:
            numbers.append(int(word))
        except ValueError:
            raise ValueError(f"{field}={word!r} must be an integer: allowed is >= 1") from None
    return tuple(numbers)
