"""The demo's policies side by side: this process and its helpers, each with a model, take one after another.

If a helper dies or fails, this process runs its policy again, and meets the same error if there is one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from longthink.cli.decode import Decoded
from longthink.cli.prompts import encode_prompt
from longthink.lab.cli.race import ResidentLog, Runner, run_policy
from longthink.lab.processes import Child, Parent, serve

if TYPE_CHECKING:
    from longthink.models import Loaded

Shown = Callable[[Runner], AbstractContextManager[Callable[[], None]]]
"""Opens the display of a run; the context's value is called after every change."""

_REPORT_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Course:
    """What all policies run: the prompt, the budget arguments of ``make_cache``, and the token limit."""

    prompt: str
    budget: dict[str, int]
    limit: int


@contextmanager
def helpers(count: int) -> Iterator[list[Child]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Child("longthink.lab.cli.lanes"))) for _ in range(count)]


def race(
    runners: Sequence[Runner], loaded: Loaded, course: Course, helping: Sequence[Child], shown: Shown
) -> int:
    """Run every policy, in all processes at once; return how many ran one. A run is followed in `shown`."""
    waiting = deque(runners)
    useful: set[int] = set()
    threads = []
    for helper in helping:
        args = (helper, waiting, course, shown, useful)
        threads.append(threading.Thread(target=_follow, args=args, daemon=True))
        threads[-1].start()
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


def _follow(helper: Child, waiting: deque[Runner], course: Course, shown: Shown, useful: set[int]) -> None:
    try:
        helper.receive()
    except Exception:
        return
    while (runner := _next(waiting)) is not None:
        try:
            helper.send([runner.name, runner.log.prompt, asdict(course)])
            with shown(runner) as on_change:
                while runner.decoded is None:
                    live, decoded, log = helper.receive()
                    vars(runner).update(live)
                    vars(runner.log).update(log)
                    runner.decoded = decoded and Decoded(**decoded)
                    on_change()
            useful.add(id(helper))
        except Exception:
            runner.tail = ""
            waiting.append(runner)
            return


def _help(parent: Parent) -> None:
    """Run the policies that the parent sends, in the helper's process."""
    from longthink.models import load_model
    from longthink.policies import make_policy

    loaded = load_model()
    parent.send("ready")
    while True:
        policy, prompt, course = parent.receive()
        runner = Runner(policy=make_policy(policy), log=ResidentLog(prompt=prompt))
        _run_waiting(deque([runner]), loaded, Course(**course), partial(_reports, parent))
        assert runner.decoded is not None
        log = {name: _plain(value) for name, value in vars(runner.log).items()}
        parent.send([_live(runner), asdict(runner.decoded), log])


@contextmanager
def _reports(parent: Parent, runner: Runner) -> Iterator[Callable[[], None]]:
    reported = 0.0

    def report() -> None:
        nonlocal reported
        if time.monotonic() >= reported + _REPORT_EVERY_S:
            reported = time.monotonic()
            parent.send([_live(runner), None, {}])

    yield report


def _live(runner: Runner) -> dict[str, Any]:
    return {name: getattr(runner, name) for name in ("tokens", "tail", "ms", "held")}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value


if __name__ == "__main__":
    serve(_help)
