"""The other end of `protocol`: a worker as an object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from longthink.errors import BenchError
from longthink.lab.bench.peers.protocol import QUIET

_ROOT = Path(__file__).parents[2]
# Another environment has no longthink, and must not see the packages beside it: only this package is shown to it.
_START = """
import runpy, sys, types
package = types.ModuleType("longthink")
package.__path__ = [sys.argv[1]]
sys.modules["longthink"] = package
runpy.run_module(sys.argv[2], run_name="__main__")
"""


class Worker:
    """A process that measures; closing it ends the process.

    Parameters
    ----------
    module
        What it runs, such as ``longthink.lab.bench.peers.own``.
    python
        Interpreter of its environment; None is our own.

    Raises
    ------
    BenchError
        If it cannot be started, answers with an error, or ends.
    """

    def __init__(self, module: str, python: Path | None = None) -> None:
        self._name = module.rpartition(".")[2]
        command = [sys.executable, "-m", module]
        if python is not None:
            command = [str(python), "-c", _START, str(_ROOT), module]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (close does it)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | QUIET,
        )

    def send(self, ask: str, **values: Any) -> None:
        """Ask, and do not wait for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"ask": ask, **values}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def receive(self) -> dict[str, Any]:
        """Return the answer to the oldest question."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"worker {self._name!r}: {answer['error']}")
        return answer

    def ask(self, ask: str, **values: Any) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        self.send(ask, **values)
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
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # it ended with a question unread

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
