"""Rounds in which every system of a scene decodes a block, each in its own process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from longthink.environment import hardware, versions
from longthink.errors import BenchError
from longthink.lab.bench.peers.client import Worker
from longthink.lab.bench.peers.folders import interpreter, model_folder
from longthink.lab.bench.peers.plan import (
    BLOCK_STEPS,
    FLOOR,
    KEEP_ALL,
    WORKERS,
    PeersPlan,
    Place,
    Scene,
    scenes,
)
from longthink.lab.bench.peers.protocol import THREADS, Point
from longthink.lab.bench.plan import BLOCK, new_run, quartiles
from longthink.lab.results.records import Measurement
from longthink.policies import make_policy, needs_budget

Told = Callable[[str], None]
"""Called with what goes on."""

_OWN = "longthink.lab.bench.peers.own"
_PROCESSES = ("", "second", "third")
"""Our own caches are spread over them: nearly all the time of a short run goes into compiling."""
_FEW = 4
_LONG_BLOCK_MS = 600.0
"""A block takes about this long at most, but `_FEW` steps of a peer and a page of ours in any case."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What was measured of one system at one place.

    Attributes
    ----------
    scene
        Number of the scene; only what was measured in the same one may be compared.
    batch
        Whether the scene is about rows side by side.
    model
        Short name of the model.
    ms
        Milliseconds of CPU time per step, a value for each round.
    read_bytes
        Bytes that a step of the floor reads, None for all others.
    row
        The same for a result store.
    """

    scene: int
    batch: bool
    model: str
    place: Place
    ms: tuple[float, ...]
    read_bytes: int | None
    row: Measurement


@dataclass
class Found:
    """All that a run has found, also when it was cut short.

    Attributes
    ----------
    missing
        Why a system could not be measured, by its name.
    versions
        Versions of packages, by the environment that they are in.
    """

    timed: list[Timed] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)


def measure(plan: PeersPlan, found: Found, told: Told = lambda text: None) -> Iterator[Timed]:
    """Measure scene by scene; a system that fails goes into ``found.missing``, and the others go on.

    Everything that is measured goes into ``found`` as well. In a scene all systems take turns, a block each, and
    the first block of each is not counted.

    Raises
    ------
    BenchError
        If not even our own worker can be started.
    """
    run = new_run()
    with ExitStack() as stack:
        workers = _Workers(stack, found, told)
        for stage in _stages(plan, workers, found, told):
            for one in stage.measure(run):
                found.timed.append(one)
                yield one


def _stages(plan: PeersPlan, workers: _Workers, found: Found, told: Told) -> Iterator[_Stage]:
    """The scenes, whose systems are ready."""
    ready = []
    for number, scene in enumerate(scenes(plan)):
        stage = _Stage(plan, scene, number, workers, found.missing, told)
        if plan.at_once:
            ready.append(stage)
        else:
            stage.wait()
            yield stage
    for stage in ready:
        stage.wait()
    yield from ready


class _Workers:
    """The processes of a run, started when they are first needed."""

    def __init__(self, stack: ExitStack, found: Found, told: Told) -> None:
        self._stack, self._found, self._told = stack, found, told
        self._all: dict[tuple[str, str], Worker] = {}
        self._cannot: dict[tuple[str, str], BenchError] = {}
        self._ours = {FLOOR: (_OWN, _PROCESSES[0])}

    def of(self, system: str) -> Worker:
        """Return the process that measures a system; what cannot be installed is not tried again."""
        process = _PROCESSES[len(self._ours) % len(_PROCESSES)]
        kind = WORKERS.get(system) or self._ours.setdefault(system, (_OWN, process))
        if kind in self._cannot:
            raise self._cannot[kind]
        try:
            return self._started(kind)
        except BenchError as error:
            self._cannot[kind] = error
            raise

    def _started(self, kind: tuple[str, str]) -> Worker:
        module, name = kind
        if kind not in self._all or not self._all[kind].alive:
            ours = module == _OWN
            self._all[kind] = self._stack.enter_context(
                Worker(module, None if ours else interpreter(name, self._told))
            )
            self._found.versions["longthink" if ours else name] = self._all[kind].ask("versions")
        return self._all[kind]


class _Stage:
    """The systems of a scene, in their processes. What fails is noted and left out, and the others go on."""

    def __init__(
        self,
        plan: PeersPlan,
        scene: Scene,
        number: int,
        workers: _Workers,
        missing: dict[str, str],
        told: Told,
    ) -> None:
        self._plan, self._scene, self._number, self._told, self._missing = plan, scene, number, told, missing
        self._on: dict[int, Worker] = {}
        self._steps: dict[int, int] = {}
        folder = str(model_folder(plan.models[scene.model]))
        for i, place in enumerate(scene.places):
            with self._leave_out(i, "start"):
                self._on[i] = workers.of(place.system)
                self._on[i].send("open", id=self._id(i), point=asdict(self._point(place, folder)))

    def _id(self, i: int) -> str:
        return f"{self._number}/{i}"

    def wait(self) -> None:
        """Wait until all are ready; all processes get there at the same time."""
        for i, worker in list(self._on.items()):
            with self._leave_out(i, "getting ready"):
                worker.receive()

    def _point(self, place: Place, folder: str) -> Point:
        return Point(
            system=place.system,
            way=place.way,
            folder=folder,
            context=place.context,
            rows=place.rows,
            budget=self._plan.budget,
            prompt=self._plan.prompt,
            steps=1 + BLOCK_STEPS * (self._plan.rounds + 1),
        )

    @contextmanager
    def _leave_out(self, i: int, doing: str) -> Iterator[None]:
        place = self._scene.places[i]
        self._told(f"{self._scene.model}, {place.label}, {place.context} tokens: {doing}")
        try:
            yield
        except BenchError as error:
            self._missing.setdefault(place.system, str(error))
            self._on.pop(i, None)

    def measure(self, run: str) -> Iterator[Timed]:
        """Let the systems decode, and take them down."""
        times = self._take_turns()
        for i, facts in self._close().items():
            place = self._scene.places[i]
            yield Timed(
                scene=self._number,
                batch=self._scene.batch,
                model=self._scene.model,
                place=place,
                ms=tuple(times[i]),
                read_bytes=facts.get("read_bytes"),
                row=_row(self._plan, self._scene, place, run, times[i], facts),
            )

    def _take_turns(self) -> dict[int, list[float]]:
        """Let the systems decode blocks in turns; the first block of each warms it up and does not count."""
        times: dict[int, list[float]] = {i: [] for i in self._on}
        for turn in range(self._plan.rounds + 1):
            for i, worker in list(self._on.items()):
                place = self._scene.places[i]
                least = _FEW if place.system in WORKERS else BLOCK
                count = self._steps.get(i, least)
                with self._leave_out(i, f"round {turn}/{self._plan.rounds}"):
                    ms = worker.ask("decode", id=self._id(i), steps=count)["ms"] / count
                    if turn:
                        times[i].append(ms)
                    else:
                        fits = min(BLOCK_STEPS, int(_LONG_BLOCK_MS / ms))
                        self._steps[i] = max(least, fits // least * least)
        return {i: times[i] for i in self._on}

    def _close(self) -> dict[int, dict[str, Any]]:
        """Take the systems down, and return what they say of themselves."""
        facts = {}
        for i, worker in list(self._on.items()):
            with self._leave_out(i, "closing"):
                facts[i] = worker.ask("close", id=self._id(i))
        return facts


def _row(
    plan: PeersPlan, scene: Scene, place: Place, run: str, ms: list[float], facts: dict[str, Any]
) -> Measurement:
    ours = place.system not in WORKERS and place.system != FLOOR
    unbounded = place.system in KEEP_ALL or (ours and not needs_budget(make_policy(place.system)))
    curve = [f"{place.rows} rows"] if scene.batch else []
    curve += ["beside"] if place.context != scene.places[0].context else []
    low, middle, high = quartiles(ms)
    return Measurement(
        # One run is one curve: what stands beside the scene's own context, for a ratio, is another.
        run="/".join([run, scene.model, *curve, place.label]),
        kind="batch" if scene.batch else "peers",
        system=place.label,
        model=plan.models[scene.model],
        dtype="float32",
        budget=None if unbounded else plan.budget,
        decode_budget=None,
        rows=place.rows,
        prompt_tokens=plan.prompt,
        decode_tokens=place.context - plan.prompt,
        ms_per_token=middle,
        ms_per_token_low=low,
        ms_per_token_high=high,
        seconds=None,
        kv_bytes=facts["kv_bytes"],
        metadata_bytes=facts["metadata_bytes"],
        rss_bytes=None,
        device_bytes=None,
        fast_forwarded=facts["fast_forwarded"],
        threads=int(THREADS),
        versions=json.dumps(versions()),
        hardware=json.dumps(hardware()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
