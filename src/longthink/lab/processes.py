"""Child processes that exchange JSON with this one, one value a line, over their standard input and output.

Plain pipes rather than `multiprocessing`: its connections pickle, and its spawn method runs the caller's main module
a second time. A child dies with its parent, whose end closes its input. Ctrl-C reaches only the parent.
"""

from __future__ import annotations

import builtins
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from longthink import errors


class ChildDied(Exception):
    """A child process ended before it answered; the text is its signal or exit code."""


class Child:
    """Runs ``python -m module``, which calls `serve`, in a child process; the current folder is not on its path.

    `env` comes on top of this process's variables, `quiet` drops standard error, and several children may share an
    `inbox`, to wait for any of them: it gets pairs of a child and what `parse` reads.
    """

    def __init__(
        self, module: str, *arguments: str, env: Mapping[str, str] | None = None, quiet: bool = False,
        inbox: queue.SimpleQueue[tuple[Child, bytes]] | None = None,
    ) -> None:  # fmt: skip
        self._inbox = queue.SimpleQueue() if inbox is None else inbox
        with _interrupts_blocked():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments], env=os.environ | dict(env or {}),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL if quiet else None,
            )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._from:
            self._inbox.put((self, line))
        self._inbox.put((self, b""))

    def send(self, message: Any) -> None:
        """Send a message; if the child is dead, the next `receive` says so."""
        with suppress(BrokenPipeError):
            self._to.write(json.dumps(message).encode() + b"\n")
            self._to.flush()

    def receive(self, timeout: float | None = None) -> Any:
        """Return the next message, as `parse` does; `TimeoutError` after `timeout` seconds."""
        try:
            return self.parse(self._inbox.get(timeout=timeout)[1])
        except queue.Empty:
            raise TimeoutError from None

    def parse(self, line: bytes) -> Any:
        """Return the message in a line of the inbox; raise `ChildDied`, or the error that ended `serve`."""
        if not line.endswith(b"\n"):
            code = self._process.wait()
            raise ChildDied(f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
        message = json.loads(line)
        if isinstance(message, dict) and "error" in message:
            raise _rebuilt(message["error"], message["text"])
        return message

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # messages that it had not read
            self._to.close()
        self._reader.join()
        self._from.close()


def _rebuilt(kind: str, text: str) -> Exception:
    cls = getattr(errors, kind, None) or getattr(builtins, kind, None)
    if isinstance(cls, type) and issubclass(cls, Exception):
        with suppress(TypeError):  # it takes other arguments
            return cls(text)
    return RuntimeError(f"{kind} in a child process: {text}")


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C. A child that starts meanwhile inherits that, so it is safe even while its interpreter loads."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


class Parent:
    """The child's end of the pipes. What libraries print goes to standard error, not among the messages."""

    def __init__(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._messages = os.fdopen(os.dup(1), "w", encoding="ascii")
        os.dup2(2, 1)
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self._inbox.put(json.loads(line))
        os._exit(1)  # the parent is gone

    def receive(self) -> Any:
        return self._inbox.get()

    def send(self, message: Any) -> None:
        print(json.dumps(message), file=self._messages, flush=True)


def serve(work: Callable[[Parent], None]) -> None:
    """Run the child's side and end this process; an error of `work` becomes one of the parent's `receive`."""
    parent, code = Parent(), 0
    try:
        work(parent)
    except Exception as error:
        code = 1
        with suppress(BrokenPipeError):
            parent.send({"error": type(error).__name__, "text": str(error)})
    sys.stderr.flush()
    os._exit(code)  # an ordinary exit would wait for the thread that reads
