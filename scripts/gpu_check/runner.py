"""Runs parts in parallel, each in a process of its own, and gives one at a time exclusive use of the machine.

A part spends most of its time in a compiler on one core, so several run at once. To time something a part asks for
exclusive use, and the others are stopped (SIGSTOP) until it is done. Stopped time does not count against limits.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .parts import Part
from .sheet import RESTART

ROOT = Path(__file__).resolve().parents[2]
SETTLE_S = 0.2
"""Time for the GPU to finish the work of stopped processes."""
QUIET_S = 40.0
"""Longest exclusive use: longer, and the part may be waiting for one that is stopped."""


@dataclass
class Outcome:
    """Result of a part. `state` is "done", "failed", "timed out", "skipped" or "no GPU"."""

    part: Part
    state: str
    seconds: float = 0.0
    note: str = ""
    found: dict[str, Any] = field(default_factory=dict)


class Job:
    """A running part."""

    def __init__(self, part: Part, folder: Path, environment: dict[str, str], limit_s: float) -> None:
        self.part, self.limit_s = part, limit_s
        stem = "".join(letter if letter.isalnum() else "-" for letter in part.name)
        self.file, self.log = folder / f"{stem}.json", folder / f"{stem}.log"
        self.stopped_s, self._stopped_at, self.tries = 0.0, None, 0
        self._environment = environment
        self._partial = b""
        self.began = time.monotonic()
        self.start()

    def start(self) -> None:
        """Start the process. A restarted one continues where the last one stopped."""
        self.tries += 1
        settings = json.dumps(self.part.settings)
        command = [sys.executable, "-m", "scripts.gpu_check.worker", str(self.file), self.part.call, settings]
        with self.log.open("a") as log:
            # A process group can be stopped as a whole; in our session, it ends with us.
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, process_group=0,
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Seconds that it has run, without those in which it was stopped."""
        now = time.monotonic()
        stopped = self.stopped_s + (now - self._stopped_at if self._stopped_at else 0.0)
        return now - self.began - stopped

    def stop(self) -> None:
        """Suspend it."""
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._stopped_at is not None:
            self.stopped_s += time.monotonic() - self._stopped_at
            self._stopped_at = None
            self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill it and its children."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def grant(self) -> None:
        """Grant exclusive use."""
        with suppress(BrokenPipeError):
            os.write(self.process.stdin.fileno(), b"go\n")

    def read_lines(self) -> list[str] | None:
        """Lines that it has written; None if its pipe is closed."""
        data = os.read(self.process.stdout.fileno(), 4096)
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [line.decode() for line in lines] if data else None

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def outcome(self, state: str, note: str) -> Outcome:
        try:
            found = json.loads(self.file.read_text())
        except (OSError, ValueError):
            found = {"rows": []}
        if state == "done" and "skipped" in found:
            state, note = "no GPU", found["skipped"]
        errors = [found[name] for name in ("error", "compile_error") if name in found]
        return Outcome(self.part, state, round(self.seconds, 1), "; ".join(errors) or note, found)


class Runner:
    """Runs parts until all are done or time runs out.

    Parameters
    ----------
    folder
        For the files and logs of the parts.
    workers
        Parts to run in parallel.
    deadline
        Value of `time.monotonic` at which all parts are killed.
    environment
        Environment variables of the parts.
    """

    def __init__(self, folder: Path, workers: int, deadline: float, environment: dict[str, str]) -> None:
        self.folder, self.workers, self.deadline = folder, workers, deadline
        self.environment = environment
        self.gigabytes = 40.0
        """GPU memory to share; updated by the part that queries the device."""
        self._jobs: list[Job] = []
        self._asking: list[Job] = []
        self._alone: Job | None = None
        self._alone_since = 0.0
        self._pipes = selectors.DefaultSelector()

    def run(self, parts: list[Part], report: Callable[[Outcome], None]) -> None:
        """Run the parts, and report each outcome at once. No process is left behind, whatever happens."""
        waiting, self._report = list(parts), report
        try:
            while waiting or self._jobs:
                self._begin(waiting)
                self._listen()
                self._share()
                self._end()
        finally:
            for job in list(self._jobs):
                self._close(job, "timed out", "the check was stopped")
            for part in waiting:
                self._report(Outcome(part, "skipped", note="the check was stopped"))

    def _begin(self, waiting: list[Part]) -> None:
        if self._alone or self._asking:
            return
        for part in list(waiting):
            left = self.deadline - time.monotonic()
            if left < part.least_s:
                waiting.remove(part)
                note = f"{max(left, 0):.0f} s were left, it needs {part.least_s:.0f} at least"
                self._report(Outcome(part, "skipped", note=note))
                continue
            free = self.gigabytes - sum(job.part.gigabytes for job in self._jobs)
            if len(self._jobs) >= self.workers or (self._jobs and part.gigabytes > free):
                continue
            waiting.remove(part)
            job = Job(part, self.folder, self.environment, part.limit_s)
            self._jobs.append(job)
            self._pipes.register(job.process.stdout, selectors.EVENT_READ, job)

    def _listen(self) -> None:
        for key, _ in self._pipes.select(timeout=0.1):
            job: Job = key.data
            lines = job.read_lines()
            if lines is None:
                # A process that has closed its pipe is about to exit.
                self._pipes.unregister(key.fileobj)
                time.sleep(0.02)
            for line in lines or ():
                if line == "quiet":
                    self._asking.append(job)
                elif job is self._alone:
                    self._alone = None

    def _share(self) -> None:
        """Grant exclusive use to the next part that asks; if none does, resume all."""
        if self._alone and time.monotonic() - self._alone_since > QUIET_S:
            self._alone = None
        if self._alone:
            return
        if not self._asking:
            for job in self._jobs:
                job.resume()
            return
        self._alone = self._asking.pop(0)
        others = [job for job in self._jobs if job is not self._alone]
        for job in others:
            job.stop()
        self._alone.resume()
        if others:
            time.sleep(SETTLE_S)
        self._alone_since = time.monotonic()
        self._alone.grant()

    def _end(self) -> None:
        for job in list(self._jobs):
            code = job.process.poll()
            if code == RESTART and job.tries < 5 and job.seconds < job.limit_s - 15:
                self._disconnect(job)
                job.start()
                self._pipes.register(job.process.stdout, selectors.EVENT_READ, job)
            elif code == 0:
                self._close(job, "done", "")
            elif code is not None:
                cause = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
                self._close(job, "failed", f"{cause}; {_last_line(job.log)}")
            elif time.monotonic() > self.deadline:
                self._close(job, "timed out", "the time limit of the check was reached")
            elif job.seconds > job.limit_s:
                self._close(job, "timed out", f"its limit is {job.limit_s:.0f} s")

    def _close(self, job: Job, state: str, note: str) -> None:
        job.kill()
        self._disconnect(job)
        self._jobs.remove(job)
        self._report(job.outcome(state, note))

    def _disconnect(self, job: Job) -> None:
        """Close the pipes of a process that has exited, and drop its request for exclusive use."""
        if job.process.stdout in self._pipes.get_map():
            self._pipes.unregister(job.process.stdout)
        for pipe in (job.process.stdout, job.process.stdin):
            pipe.close()
        self._asking = [other for other in self._asking if other is not job]
        if self._alone is job:
            self._alone = None


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "its log is empty"
