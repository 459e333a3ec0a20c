"""The client side of `bench.protocol`: a worker process as an object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.protocol import ENVIRONMENT
from longthink.errors import BenchError

ROOT = Path(__file__).parents[1]
"""The repository, from which workers import `bench`."""


class Worker:
    """A worker process; leaving the context kills it.

    It runs `module` with the interpreter `python`, None being our own. Another environment does not see our packages:
    `PYTHONPATH` is ignored there, and the packages at the repository's root are no part of what is measured. All
    methods raise `BenchError` if the process answers with an error or has ended.
    """

    def __init__(self, module: str, python: Path | None = None) -> None:
        self._name = module.rpartition(".")[2]
        interpreter = [sys.executable] if python is None else [str(python), "-E"]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (close does it)
        self._process = subprocess.Popen(
            [*interpreter, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
        )

    def send(self, command: str, **values: Any) -> None:
        """Send a command without waiting for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **values}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def receive(self) -> dict[str, Any]:
        """Return the answer to the oldest unanswered command."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"worker {self._name!r}: {answer['error']}")
        return answer

    def call(self, command: str, **values: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.send(command, **values)
        return self.receive()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def _ended(self) -> BenchError:
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().rpartition("\n")[2] or "it wrote no message"
        return BenchError(f"worker {self._name!r} ended with code {code}: {last}")

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # the process ended with a command unread

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
