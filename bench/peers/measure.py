"""Rounds in which each system of a scene decodes a block, in its own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.client import Worker
from bench.folders import interpreter, model_folder
from bench.peers.plan import BLOCK_STEPS, DENSE, FLOOR, OWN, WORKERS, Case, PeersPlan, Scene, scenes
from bench.protocol import THREADS, Job
from longthink.errors import BenchError
from longthink.lab.bench.plan import BLOCK
from longthink.lab.bench.rows import new_row, new_run, quartiles
from longthink.lab.results.records import Measurement
from longthink.policies import make_policy, needs_budget

Report = Callable[[str], None]
"""Called with what happens next."""

_PROCESSES = ("", "second", "third")
"""Processes that share our own caches, because most of a quick run is compiling."""
_FEW = 4
_MAX_BLOCK_MS = 600.0
"""Longest block in time; but at least `_FEW` steps of a peer and a page of ours."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The measurement of one case."""

    scene: int  # only timings of the same scene are comparable
    batch: bool  # whether the scene compares batches
    model: str  # short name
    case: Case
    ms: tuple[float, ...]  # CPU time per step, one value per round
    read_bytes: int | None  # by a step of the floor
    row: Measurement  # the same for a result store


@dataclass
class Results:
    """The results of a run, complete or interrupted."""

    timings: list[Timing] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Why a system could not be measured, by its name."""
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    """Package versions by environment."""


def measure(plan: PeersPlan, results: Results, report: Report = lambda text: None) -> Iterator[Timing]:
    """Measure scene by scene, into `results` as well; a system that fails is noted there, and the others go on.

    In a scene all systems take turns, a block each, and the first block of each is not counted.
    """
    run = new_run()
    with ExitStack() as stack:
        workers = _Workers(stack, results, report)
        numbered = list(enumerate(scenes(plan)))
        for together in [numbered] if plan.at_once else [[one] for one in numbered]:
            stages = [
                _Stage(plan, scene, number, workers, results.missing, report) for number, scene in together
            ]
            for stage in stages:
                stage.wait()
            for stage in stages:
                for timing in stage.measure(run):
                    results.timings.append(timing)
                    yield timing


class _Workers:
    """The processes of a run, each started when it is first needed."""

    def __init__(self, stack: ExitStack, results: Results, report: Report) -> None:
        self._stack, self._results, self._report = stack, results, report
        self._started: dict[tuple[str, str], Worker] = {}
        self._failed: dict[tuple[str, str], BenchError] = {}
        self._own = {FLOOR: (OWN, _PROCESSES[0])}

    def of(self, system: str) -> Worker:
        """Return the process that measures a system; a failed installation is not tried again."""
        process = _PROCESSES[len(self._own) % len(_PROCESSES)]
        kind = WORKERS.get(system) or self._own.setdefault(system, (OWN, process))
        if kind in self._failed:
            raise self._failed[kind]
        try:
            if kind not in self._started or not self._started[kind].alive:
                self._start(*kind)
        except BenchError as error:
            self._failed[kind] = error
            raise
        return self._started[kind]

    def _start(self, module: str, name: str) -> None:
        own = module == OWN
        worker = Worker(module, None if own else interpreter(name, self._report))
        self._started[module, name] = self._stack.enter_context(worker)
        self._results.versions["longthink" if own else name] = worker.call("versions")


class _Stage:
    """The systems of a scene in their processes. A system that fails is noted in `missing` and left out."""

    def __init__(
        self,
        plan: PeersPlan,
        scene: Scene,
        number: int,
        workers: _Workers,
        missing: dict[str, str],
        report: Report,
    ) -> None:
        self._plan, self._scene, self._number, self._report = plan, scene, number, report
        self._missing = missing
        self._on: dict[int, Worker] = {}
        folder = str(model_folder(plan.models[scene.model]))
        for i, case in enumerate(scene.cases):
            job = Job(
                **asdict(case),
                folder=folder,
                budget=plan.budget,
                prompt=plan.prompt,
                steps=1 + BLOCK_STEPS * (plan.rounds + 1),
            )
            with self._or_missing(i, "starting"):
                self._on[i] = workers.of(case.system)
                self._on[i].send("open", id=self._id(i), job=asdict(job))

    def wait(self) -> None:
        """Wait until all systems are ready; the processes prepare them concurrently."""
        for i, worker in list(self._on.items()):
            with self._or_missing(i, "preparing"):
                worker.receive()

    def measure(self, run: str) -> Iterator[Timing]:
        """Time the systems and close them."""
        times = self._take_turns()
        for i, worker in list(self._on.items()):
            with self._or_missing(i, "closing"):
                yield self._timing(i, times[i], worker.call("close", id=self._id(i)), run)

    def _id(self, i: int) -> str:
        return f"{self._number}/{i}"

    @contextmanager
    def _or_missing(self, i: int, doing: str) -> Iterator[None]:
        case = self._scene.cases[i]
        self._report(f"{self._scene.model}, {case.label}, {case.context} tokens: {doing}")
        try:
            yield
        except BenchError as error:
            self._missing.setdefault(case.system, str(error))
            self._on.pop(i, None)

    def _take_turns(self) -> dict[int, list[float]]:
        """Time blocks in turns; the first block of each system is warm-up and sets the length of the others."""
        times: dict[int, list[float]] = {i: [] for i in self._on}
        steps: dict[int, int] = {}
        for turn in range(self._plan.rounds + 1):
            for i, worker in list(self._on.items()):
                least = _FEW if self._scene.cases[i].system in WORKERS else BLOCK
                count = steps.get(i, least)
                with self._or_missing(i, f"round {turn}/{self._plan.rounds}"):
                    ms = worker.call("decode", id=self._id(i), steps=count)["ms"] / count
                    if turn:
                        times[i].append(ms)
                    else:
                        fits = min(BLOCK_STEPS, int(_MAX_BLOCK_MS / ms))
                        steps[i] = max(least, fits // least * least)
        return times

    def _timing(self, i: int, ms: list[float], facts: dict[str, Any], run: str) -> Timing:
        plan, scene, case = self._plan, self._scene, self._scene.cases[i]
        own = case.system not in WORKERS and case.system != FLOOR
        unbounded = case.system in DENSE or (own and not needs_budget(make_policy(case.system)))
        # One run is one curve: a case at another context than the scene's, there for a ratio, is on another.
        curve = [f"{case.rows} rows"] if scene.batch else []
        curve += ["beside"] if case.context != scene.cases[0].context else []
        low, middle, high = quartiles(ms)
        read_bytes = facts.pop("read_bytes", None)
        row = new_row(
            run="/".join([run, scene.model, *curve, case.label]),
            kind="batch" if scene.batch else "peers",
            system=case.label,
            model=plan.models[scene.model],
            dtype="float32",
            budget=None if unbounded else plan.budget,
            rows=case.rows,
            prompt_tokens=plan.prompt,
            decode_tokens=case.context - plan.prompt,
            ms_per_token=middle,
            ms_per_token_low=low,
            ms_per_token_high=high,
            threads=int(THREADS),
            **facts,
        )
        return Timing(
            scene=self._number,
            batch=scene.batch,
            model=scene.model,
            case=case,
            ms=tuple(ms),
            read_bytes=read_bytes,
            row=row,
        )
