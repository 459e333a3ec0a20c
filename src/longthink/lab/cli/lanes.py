"""The lanes of the demo's race: this process and helpers beside it, each with a model of its own.

A lane that is free takes the next policy. Nothing that is told depends on the lane but the time of a token. A helper
that ends early, however it went, leaves its policy to this process, which then meets the same error, if it was one.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from longthink.cli.prompts import encode_prompt
from longthink.lab.cli.race import Runner, run_policy
from longthink.lab.cli.residents import ResidentLog

if TYPE_CHECKING:
    from longthink.models import Loaded

Shown = Callable[[Runner], AbstractContextManager[Callable[[], None]]]
"""Makes the display of one run: a context that gives a function to call after every change."""

_NEWS_EVERY_S = 0.1
"""Seconds between two reports of a helper, at least."""
_STOP_S = 3.0
"""Seconds that a helper gets to end when it is told to."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What all policies run: the prompt, the budget arguments of ``make_cache``, and the tokens that end a run."""

    prompt: str
    budget: dict[str, int]
    limit: int


@dataclass(frozen=True)
class Helper:
    """A process that runs policies, and our end of the pipe to it."""

    process: BaseProcess
    pipe: Connection


@contextmanager
def helpers(count: int) -> Iterator[list[Helper]]:
    """Start ``count`` helpers, which begin to load the model, and end them with the ``with`` block."""
    context = get_context("spawn")
    started: list[Helper] = []
    try:
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_help, args=(theirs,), name=f"longthink-demo-{number}", daemon=True
            )
            with _without_interrupts():
                process.start()
            theirs.close()
            started.append(Helper(process, ours))
        yield started
    finally:
        for helper in started:
            helper.process.terminate()
        for helper in started:
            helper.process.join(_STOP_S)
            if helper.process.is_alive():
                helper.process.kill()
                helper.process.join()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back; a process that is started meanwhile never gets it, not even while it wakes up."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def race(
    runners: Sequence[Runner], loaded: Loaded, course: Course, helping: Sequence[Helper], shown: Shown
) -> int:
    """Run every policy over the course, as many at a time as there are lanes, and return how many lanes ran one.

    Parameters
    ----------
    runners
        The policies; each runner is filled as its run goes on.
    loaded
        The model of this process's own lane.
    helping
        The other lanes.
    shown
        Makes the display of a run; called in the thread that follows it.
    """
    waiting = deque(runners)
    useful: set[int] = set()
    threads = [
        threading.Thread(target=_follow, args=(helper, waiting, course, shown, useful), daemon=True)
        for helper in helping
    ]
    for thread in threads:
        thread.start()
    while waiting:
        _run_waiting(waiting, loaded, course, shown)
        for thread in threads:
            thread.join()
    return 1 + len(useful)


def _run_waiting(waiting: deque[Runner], loaded: Loaded, course: Course, shown: Shown) -> None:
    inputs = encode_prompt(loaded.tokenizer, course.prompt, raw=True)
    while (runner := _next(waiting)) is not None:
        with shown(runner) as on_change:
            run_policy(runner, loaded, inputs, course.budget, limit=course.limit, on_change=on_change)


def _next(waiting: deque[Runner]) -> Runner | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _follow(helper: Helper, waiting: deque[Runner], course: Course, shown: Shown, useful: set[int]) -> None:
    """Give one helper, once it is ready, a policy after the other, and fill the runners with what it tells."""
    try:
        helper.pipe.recv()
    except (EOFError, OSError):
        return
    while (runner := _next(waiting)) is not None:
        try:
            helper.pipe.send((runner.policy, runner.log.prompt, course))
            with shown(runner) as on_change:
                while runner.decoded is None:
                    vars(runner).update(helper.pipe.recv())
                    on_change()
            useful.add(id(helper))
        except Exception:
            runner.tail = ""
            waiting.append(runner)
            return


# The helper's side --------------------------------------------------------------------------------------------


def _help(pipe: Connection) -> None:
    """Run policies until the other side ends this process, or is gone."""
    # Ctrl-C goes to the whole group of processes: the first one decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        from longthink.models import load_model

        loaded = load_model()
        pipe.send("ready")
        while True:
            policy, prompt, course = pipe.recv()
            runner = Runner(policy=policy, log=ResidentLog(prompt=prompt))
            _run_waiting(
                deque([runner]), loaded, course, lambda runner: nullcontext(_News(pipe, runner).tell)
            )
            pipe.send(vars(runner))
    except Exception:
        # The other side sees the pipe end, and goes on without this one.
        return


class _News:
    """Tells the other side now and then how a run is going: what changes often, and is small."""

    def __init__(self, pipe: Connection, runner: Runner) -> None:
        self._pipe, self._runner = pipe, runner
        self._next = 0.0

    def tell(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _NEWS_EVERY_S
            self._pipe.send({name: getattr(self._runner, name) for name in ("tokens", "tail", "ms", "held")})
