"""Rounds in which every system of a scene decodes a block, each in its own process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from statistics import quantiles
from typing import Any

from longthink.bench.peers.client import Worker
from longthink.bench.peers.folders import interpreter, model_folder
from longthink.bench.peers.plan import (
    FLOOR,
    KEEP_ALL,
    WORKERS,
    PeersPlan,
    Place,
    Scene,
    scenes,
)
from longthink.bench.peers.protocol import THREADS, Point
from longthink.bench.plan import new_run
from longthink.errors import BenchError
from longthink.policies import make_policy
from longthink.results.environment import hardware, versions
from longthink.results.records import Measurement

_OWN = ("longthink.bench.peers.own", "")
_FEW = 4
_LONG_BLOCK_MS = 1500.0
"""A peer's block takes about this long at most, but `_FEW` steps in any case; blocks of ours are whole pages."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What was measured of one system at one place.

    Attributes
    ----------
    scene
        Number of the scene; only what was measured in the same one may be compared.
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


def measure(
    plan: PeersPlan, found: Found, told: Callable[[str], None] = lambda text: None
) -> Iterator[Timed]:
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
        for number, scene in enumerate(scenes(plan)):
            for one in _measure_scene(plan, scene, number, run, workers, told):
                found.timed.append(one)
                yield one


class _Workers:
    """The processes of a run, started when they are first needed."""

    def __init__(self, stack: ExitStack, found: Found, told: Callable[[str], None]) -> None:
        self._stack, self._found, self._told = stack, found, told
        self._all: dict[tuple[str, str], Worker] = {}

    def of(self, system: str) -> Worker:
        module, environment = WORKERS.get(system, _OWN)
        if (module, environment) not in self._all:
            python = None if module == _OWN[0] else interpreter(environment, self._told)
            self._told(f"starting {environment or 'longthink'}")
            worker = self._stack.enter_context(Worker(module, python))
            self._found.versions[environment or "longthink"] = worker.ask("versions")
            self._all[module, environment] = worker
        return self._all[module, environment]

    def fail(self, system: str, error: BenchError) -> None:
        """Note why a system is missing, and let a worker that has died start anew for the next."""
        self._found.missing.setdefault(system, str(error))
        kind = WORKERS.get(system, _OWN)
        if kind in self._all and not self._all[kind].alive:
            del self._all[kind]


def _measure_scene(
    plan: PeersPlan,
    scene: Scene,
    number: int,
    run: str,
    workers: _Workers,
    told: Callable[[str], None],
) -> Iterator[Timed]:
    folder = str(model_folder(plan.models[scene.model]))
    facts: dict[int, dict[str, Any]] = {}
    for i, place in enumerate(scene.places):
        told(f"{scene.model}, {place.label}, {place.context} tokens, getting ready")
        point = Point(
            system=place.system,
            way=place.way,
            folder=folder,
            context=place.context,
            rows=place.rows,
            budget=plan.budget,
            prompt=plan.prompt,
            steps=1 + place.steps * (plan.rounds + 1),
        )
        try:
            facts[i] = workers.of(place.system).ask("open", id=i, point=asdict(point))
        except BenchError as error:
            workers.fail(place.system, error)
    times = _take_turns(plan, scene, facts, workers, told)
    for i, ms in times.items():
        place = scene.places[i]
        yield Timed(
            scene=number,
            model=scene.model,
            place=place,
            ms=tuple(ms),
            read_bytes=facts[i].get("read_bytes"),
            row=_row(plan, scene, place, f"{run}-{number}", ms, facts[i]),
        )
        workers.of(place.system).ask("close", id=i)


def _take_turns(
    plan: PeersPlan,
    scene: Scene,
    facts: dict[int, dict[str, Any]],
    workers: _Workers,
    told: Callable[[str], None],
) -> dict[int, list[float]]:
    """Let the systems of a scene decode blocks in turns; the first block of each warms it up."""
    times: dict[int, list[float]] = {i: [] for i in facts}
    steps: dict[int, int] = {}
    for turn in range(plan.rounds + 1):
        for i in list(times):
            place = scene.places[i]
            told(f"{scene.model}, {place.label}, {place.context} tokens, round {turn}/{plan.rounds}")
            count = steps.get(i, _FEW if place.system in WORKERS else place.steps)
            try:
                ms = workers.of(place.system).ask("decode", id=i, steps=count)["ms"] / count
            except BenchError as error:
                workers.fail(place.system, error)
                del times[i]
                continue
            if turn:
                times[i].append(ms)
            elif place.system in WORKERS:
                steps[i] = max(_FEW, min(place.steps, int(_LONG_BLOCK_MS / ms)))
    return times


def _row(
    plan: PeersPlan, scene: Scene, place: Place, run: str, ms: list[float], facts: dict[str, Any]
) -> Measurement:
    ours = place.system not in WORKERS and place.system != FLOOR
    unbounded = place.system in KEEP_ALL or (ours and not make_policy(place.system).needs_budget)
    low, middle, high = quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else ms * 3
    return Measurement(
        run=f"{run}/{place.label}/{place.context}",
        kind="peers",
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
