"""``python -m bench.vllm``: bounded caches in vLLM beside dense vLLM with the same pool."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from statistics import median

from bench.command import document_path, document_text, print_tables, run, setup
from bench.vllm.serving import DENSE, Served, ServingPlan, measure_serving
from longthink.cli.options import Switch, policy_specs
from longthink.cli.progress import progress
from longthink.cli.table import Table
from longthink.cli.terminal import write_json
from longthink.lab.bench.rows import quartiles
from longthink.lab.cli.bench import integers, load

SHORT, LONG = 2048, 16384
"""Contexts that the targets refer to."""


def vllm(
    *,
    policies: str = "raas,milestone",
    contexts: str = "2048,8192,16384",
    budget: int = 1024,
    rows: int = 1,
    rounds: int = 5,
    document: Path | None = None,
    json: Switch = False,
) -> int:
    """Measure bounded caches in vLLM beside dense vLLM with the same pool: speed, and requests in flight.

    Each engine runs in a process of its own, on one thread and compiled as vLLM does; times are CPU time of whole
    steps. All decode the same random model in turns: first a few requests, then as many as the pool has room for,
    which is two of the longest context.

    Parameters
    ----------
    policies
        Policies to measure, separated by commas.
    contexts
        Tokens around which steps are timed, separated by commas. Bounded caches decode them; dense ones read them.
    budget
        Tokens that bounded caches keep on top of their prompt.
    rows
        Concurrent requests.
    rounds
        Timed blocks of each system at each context.
    document
        Markdown file to write.
    json
        Print one JSON document instead of the tables.
    """
    plan = ServingPlan(
        policies=tuple(policy_specs(policies)),
        contexts=sorted(integers("contexts", contexts)),
        budget=budget,
        rows=rows,
        rounds=rounds,
    )
    page = document_path(document)
    how = setup("bench.vllm", f"decode_budget={plan.budget}")
    with progress("measuring", total=None) as task:
        results = measure_serving(plan, partial(task.advance_to, 0))
    how |= {"load_after": load(), "peers": {"vllm": results.versions}}
    tables = _tables(plan, results)
    if page is not None:
        page.write_text(document_text("vLLM, bounded and dense", how, tables), encoding="utf-8")
    if json:
        full = {"tokens_per_s": results.tokens_per_s, "running": results.running}
        write_json({"conditions": how, "ms": results.ms, "in_flight": results.in_flight, "full_pool": full})
    else:
        print_tables(tables)
    return 0


def _tables(plan: ServingPlan, results: Served) -> list[Table]:
    systems = list(results.in_flight)
    by_context = {"system": "text"} | {f"{context:,}": "text" for context in results.ms}
    return [
        Table(
            name="vllm",
            title=f"Milliseconds per step of {plan.rows} {'request' if plan.rows == 1 else 'requests'}",
            note="Around so many tokens. Median over the rounds, in brackets the quartiles.",
            columns=by_context,
            rows=[[name, *(_spread(times[name], 2) for times in results.ms.values())] for name in systems],
        ),
        Table(
            name="in-flight",
            title="Requests in flight",
            note=f"Of {plan.flood} that grow to {max(plan.contexts):,} tokens; as many as the pool has room for.",
            columns={"system": "text", "in flight": "count", "waiting": "count", "preemptions": "count"},
            rows=[
                [name, one["in_flight"], one["waiting"], one["preempted"]]
                for name, one in results.in_flight.items()
            ],
        ),
        Table(
            name="full-pool",
            title="Tokens per second with the pool full",
            note="Of as many requests of so many tokens as the pool has room for. Median, in brackets the quartiles.",
            columns=by_context,
            rows=[
                [
                    name,
                    *(
                        f"{_spread(rates[name], 0)}, {results.running[context][name]} requests"
                        for context, rates in results.tokens_per_s.items()
                    ),
                ]
                for name in systems
            ],
        ),
        Table(
            name="targets",
            title="Targets",
            note="Ratios within a round, median over the rounds.",
            columns=dict.fromkeys(("target", "wanted", "measured", "met"), "text"),
            rows=[row for name in systems if name != DENSE for row in _targets(name, results)],
        ),
    ]


def _spread(values: list[float], digits: int) -> str:
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _targets(system: str, results: Served) -> list[list[str | None]]:
    def target(text: str, wanted: float, measured: float | None) -> list[str | None]:
        met = "missing" if measured is None else "yes" if measured >= wanted else "NO"
        shown = None if measured is None else f"{measured:.2f}"
        return [f"{system}: {text}", f">= {wanted:.0f}", shown, met]

    rows = []
    for context, wanted in ((SHORT, 1.0), (LONG, 2.0)):
        few = _ratio(results.ms.get(context), DENSE, system)
        full = _ratio(results.tokens_per_s.get(context), system, DENSE)
        rows.append(target(f"tokens/s over dense, {context:,} tokens, few requests", wanted, few))
        rows.append(target(f"tokens/s over dense, {context:,} tokens, pool full", wanted, full))
    in_flight = results.in_flight[system]["in_flight"] / results.in_flight[DENSE]["in_flight"]
    return [*rows, target("requests in flight over dense", 5.0, in_flight)]


def _ratio(measured: dict[str, list[float]] | None, over: str, under: str) -> float | None:
    if measured is None:
        return None
    return median(a / b for a, b in zip(measured[over], measured[under], strict=True))


if __name__ == "__main__":
    sys.exit(run(vllm, "bench.vllm"))
