"""``longthink bench vllm``: bounded caches in vLLM beside dense vLLM with the same pool."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from longthink.cli.options import Switch, policy_specs
from longthink.cli.progress import progress
from longthink.cli.terminal import write_json
from longthink.lab.cli.bench import conditions, integer, load, words

if TYPE_CHECKING:
    from longthink.lab.bench.serving import Served, ServingPlan
    from longthink.lab.report.tables import Table

SHORT, LONG = 2048, 16384
"""Contexts that the targets speak of."""


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
        Requests decoded side by side.
    rounds
        Timed blocks of each system at each context.
    document
        Markdown file to write.
    json
        Print one JSON document instead of the tables.
    """
    from longthink.lab.bench.serving import Served, ServingPlan, measure_serving
    from longthink.lab.cli.bench_tables import document_head
    from longthink.lab.cli.peers_tables import print_table

    if document is not None and document.suffix != ".md":
        raise ValueError(f"document={str(document)!r} must end in .md")
    plan = ServingPlan(
        policies=tuple(policy_specs(policies)),
        contexts=sorted(integer("contexts", word) for word in words(contexts)),
        budget=budget,
        rows=rows,
        rounds=rounds,
    )
    found = Served()
    how = conditions() | {"command": shlex.join(["longthink", *sys.argv[1:]])}
    with progress("measuring", total=None) as task:
        measure_serving(plan, found, partial(task.advance_to, 0))
    how |= {"load_after": load(), "peers": {"vllm": found.versions}, "budget": f"decode_budget={plan.budget}"}
    tables = [_speed(plan, found), _flights(plan, found), _full(found), _targets(found)]
    if document is not None:
        parts = [
            document_head("vLLM, bounded and dense", how),
            *(table.markdown().strip() for table in tables),
        ]
        document.parent.mkdir(parents=True, exist_ok=True)
        document.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if json:
        flights = {name: vars(flight) for name, flight in found.flights.items()}
        full = {"tokens_per_s": found.full, "running": found.running}
        write_json({"conditions": how, "ms": found.ms, "in_flight": flights, "full_pool": full})
    else:
        for table in tables:
            print_table(table)
    return 0


def _quartiles(values: list[float], places: int) -> str:
    from longthink.lab.bench.plan import quartiles

    low, middle, high = quartiles(values)
    return f"{middle:.{places}f} ({low:.{places}f} to {high:.{places}f})"


def _speed(plan: ServingPlan, found: Served) -> Table:
    from longthink.lab.report.tables import Table

    rows = [
        [system, *(_quartiles(times[system], 2) for times in found.ms.values())] for system in found.flights
    ]
    return Table(
        name="vllm",
        title=f"Milliseconds per step of {plan.rows} {'request' if plan.rows == 1 else 'requests'}",
        note="Around so many tokens. Median over the rounds, in brackets the quartiles.",
        columns={"system": "text"} | {f"{context:,}": "text" for context in found.ms},
        rows=rows,
    )


def _full(found: Served) -> Table:
    from longthink.lab.report.tables import Table

    rows = [
        [
            system,
            *(
                f"{_quartiles(rates[system], 0)}, {found.running[context][system]} requests"
                for context, rates in found.full.items()
            ),
        ]
        for system in found.flights
    ]
    return Table(
        name="full-pool",
        title="Tokens per second with the pool full",
        note="Of all requests with so many tokens that the pool has room for. Median, in brackets the quartiles.",
        columns={"system": "text"} | {f"{context:,}": "text" for context in found.full},
        rows=rows,
    )


def _flights(plan: ServingPlan, found: Served) -> Table:
    from longthink.lab.report.tables import Table

    rows = [[name, one.in_flight, one.waiting, one.preempted] for name, one in found.flights.items()]
    return Table(
        name="in-flight",
        title="Requests in flight",
        note=f"Of {plan.flood} that are to get {max(plan.contexts):,} tokens long; as many as the pool has room for.",
        columns={"system": "text", "in flight": "count", "waiting": "count", "preemptions": "count"},
        rows=rows,
    )


def _targets(found: Served) -> Table:
    from longthink.lab.bench.serving import DENSE
    from longthink.lab.report.tables import Table

    rows: list[list[Any]] = []

    def target(text: str, wanted: float, measured: float | None) -> None:
        met = "missing" if measured is None else "yes" if measured >= wanted else "NO"
        rows.append([text, f">= {wanted:.0f}", None if measured is None else f"{measured:.2f}", met])

    for system in found.flights:
        if system == DENSE:
            continue
        for context, wanted in ((SHORT, 1.0), (LONG, 2.0)):
            ratio = _ratio(found.ms.get(context), DENSE, system)
            target(f"{system}: tokens/s over dense, {context:,} tokens, few requests", wanted, ratio)
            ratio = _ratio(found.full.get(context), system, DENSE)
            target(f"{system}: tokens/s over dense, {context:,} tokens, pool full", wanted, ratio)
        in_flight = found.flights[system].in_flight / found.flights[DENSE].in_flight
        target(f"{system}: requests in flight over dense", 5.0, in_flight)
    return Table(
        name="targets",
        title="Targets",
        note="Ratios within a round, median over the rounds.",
        columns={"target": "text", "wanted": "text", "measured": "text", "met": "text"},
        rows=rows,
    )


def _ratio(measured: dict[str, list[float]] | None, over: str, under: str) -> float | None:
    if measured is None:
        return None
    return median(a / b for a, b in zip(measured[over], measured[under], strict=True))
