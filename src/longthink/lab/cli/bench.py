"""``longthink bench``: time per token and memory against the decode length."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App, Parameter

from longthink.cli.app import PASSIVE
from longthink.cli.errors import EXIT_INTERRUPTED
from longthink.cli.options import BudgetOptions, ModelOptions, Switch, policy_specs
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
    help="Time and memory of the caches, beside the best dense ones of transformers.",
    suppress_keyboard_interrupt=False,
)
bench_app.command("longthink.lab.cli.bench_peers:peers", name="peers")
bench_app.command("longthink.lab.cli.bench_vllm:vllm", name="vllm")

DEFAULT_BUDGET = 1024


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BenchOptions(BudgetOptions, ModelOptions):
    """Options that the benchmarks share."""

    model: str = RANDOM
    """Hub id or folder of a model, "reasoner", or a random model: random: and its shape."""

    policies: str = "dense,raas,quest,h2o,streaming_llm,recency,random"
    """Policies to measure, separated by commas; options after colons, such as raas:r=0.25."""

    baselines: str = ",".join(BASELINES)
    """Dense caches of transformers to measure beside them, separated by commas."""

    lengths: str = "1024,2048,4096,8192,16384,32768"
    """Decoded tokens at which to measure, separated by commas."""

    fast_forward: bool = True
    """Fill the caches with made-up contents up to each length instead of decoding."""

    kv_dtype: str | None = None
    """Format that policies keep keys and values in: bfloat16, float16 or float32; the model's own unless given."""

    prompt: int = 128
    """Tokens of each prompt; they are random."""

    rows: int = 1
    """Rows decoded side by side."""

    threads: int = 1
    """CPU threads."""

    out: Path | None = None
    """Result store to add the rows to; "longthink report" draws it."""

    json: Switch = False
    """Print one JSON document instead of the tables."""

    def plan(self, **more: Any) -> Plan:
        """Return what to measure; the budget is 1024 where none is given."""
        policies = policy_specs(self.policies) if self.policies else []
        return Plan(
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            policies=tuple(dict.fromkeys(policies)),
            baselines=tuple(dict.fromkeys(words(self.baselines))),
            budget=Budget(**(self.given_budget or {"budget": DEFAULT_BUDGET})),
            lengths=tuple(integer("lengths", word) for word in words(self.lengths)),
            prompt=self.prompt,
            rows=self.rows,
            threads=self.threads,
            kv_dtype=self.kv_dtype,
            fast_forward=self.fast_forward,
            **more,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class JctOptions(BenchOptions):
    """Options of ``longthink bench jct``."""

    repeats: int = 5
    """Timed blocks of 32 steps of each cache at each length."""

    compile: Switch = False
    """Measure each policy with a compiled decode step as well."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class MemoryOptions(BenchOptions):
    """Options of ``longthink bench memory``."""

    baselines: str = "dynamic,static"
    """Dense caches of transformers to measure beside them, separated by commas."""

    lengths: str = "512,1024,2048"
    """Decoded tokens at which to measure, separated by commas."""

    fast_forward: bool = False
    """Fill the caches with made-up contents up to each length instead of decoding."""


_JCT = JctOptions()
_MEMORY = MemoryOptions()


@bench_app.command
def jct(*, options: JctOptions = _JCT) -> int:
    """Measure the time per token, and the time to decode a text, against its length.

    All caches are measured in turns in one process: CPU time on a CPU, wall-clock time elsewhere. Compiling is not
    counted. The budget is 1024 unless one is given.
    """
    plan = options.plan(repeats=options.repeats, compile=options.compile)
    store = open_store(options.out)
    with progress(f"loading {plan.model}"):
        from longthink.lab.bench.models import bench_model

        loaded = bench_model(plan.model, device=plan.device, dtype=plan.dtype)
    from longthink.lab.bench.jct import blocks_in_all, measure_jct

    work = progress("measuring", total=blocks_in_all(plan), unit="blocks")
    return _run(partial(measure_jct, plan, loaded), work, plan, store, options)


@bench_app.command
def memory(*, options: MemoryOptions = _MEMORY) -> int:
    """Measure the bytes of the cache and of the process against the decode length.

    Every cache decodes in a process of its own. The budget is 1024 unless one is given.
    """
    plan = options.plan()
    store = open_store(options.out)
    from longthink.lab.bench.memory import measure_memory

    total = (len(plan.lengths) + 1) * (len(plan.policies) + len(plan.baselines))
    work = progress("measuring", total=total, unit="rows")
    return _run(partial(measure_memory, plan), work, plan, store, options)


@bench_app.command
def kernels(
    *,
    rows: str = "1,16,64,256",
    lengths: str = "4096,16384,32768,131072",
    budgets: str = "1024,2048,4096",
    json: Switch = False,
) -> int:
    """Measure one layer's decode attention on a GPU: our kernels within budgets, dense ones at lengths.

    Parameters
    ----------
    rows
        Rows decoded side by side, separated by commas.
    lengths
        Tokens that the dense kernels read, separated by commas.
    budgets
        Tokens that ours read, multiples of 16, separated by commas.
    json
        Print one JSON document instead of the table.
    """
    from longthink.lab.bench.kernels import measure_kernels

    options = {"rows": rows, "lengths": lengths, "budgets": budgets}
    found = measure_kernels(
        **{name: tuple(integer(name, word) for word in words(text)) for name, text in options.items()}
    )
    if json:
        write_json({"hardware": hardware(), "versions": versions(), "rows": [row._asdict() for row in found]})
    else:
        from longthink.lab.cli.bench_tables import print_kernels

        print_kernels(found)
    return 0


def open_store(folder: Path | None) -> ResultStore | None:
    """Return the store to write to; it fails before anything is measured."""
    if folder is None:
        return None
    from longthink.lab.results.store import ResultStore

    return ResultStore(folder)


def _run(
    measure: Callable[[Report], Iterator[Measurement]],
    work: AbstractContextManager[Task],
    plan: Plan,
    store: ResultStore | None,
    options: BenchOptions,
) -> int:
    """Measure, keep every row as soon as it is there, and show them, also when interrupted."""
    found: list[Measurement] = []
    how = {"budget": str(plan.budget), "threads": plan.threads, "fast_forwarded": plan.fast_forward}
    how |= conditions()
    code = 0
    try:
        with work as task:
            for row in measure(task.advance_to):
                found.append(row)
                if store is not None:
                    store.add(row)
    except KeyboardInterrupt:
        kept = f" and are in {options.out}" if options.out is not None else ""
        note(f"interrupted: {len(found)} rows were measured{kept}")
        code = EXIT_INTERRUPTED
    how["load_after"] = load()
    if options.json:
        from longthink.lab.results.records import to_row

        write_json({"conditions": how, "rows": [to_row(row) for row in found]})
    elif found:
        from longthink.lab.cli.bench_tables import print_tables

        print_tables(found, how)
    return code


def conditions() -> dict[str, Any]:
    """Return how and where a run takes place, ready for JSON."""
    return {
        **{name: os.environ.get(name) for name in PASSIVE},
        "versions": versions(),
        "hardware": hardware(),
        "load_before": load(),
    }


def load() -> float | None:
    """Load average of the last minute: how many others wanted the cores."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def words(text: str) -> list[str]:
    """Return the parts of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def integer(field: str, word: str) -> int:
    """Return the number that a word of an option says."""
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"{field}={word!r} must be an integer: allowed is >= 1") from None
