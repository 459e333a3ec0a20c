"""Results of a part, written to its own file as they are found, so that none can be lost."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

RESTART = 75
"""Exit code of a part that asks to continue in a new process."""


class Sheet:
    """Results of one part, and its connection to the runner.

    Parameters
    ----------
    path
        File of the part. If it exists, its results are kept.
    settings
        Settings of the part.
    say, hear
        Streams on which `quiet` asks the runner and waits for its answer; None without a runner.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], say: TextIO | None = None, hear: TextIO | None = None
    ) -> None:
        self.path, self.settings = path, settings
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
        self._say, self._hear = say, hear

    def put(self, **fields: Any) -> None:
        """Store fields of the whole part."""
        self.found.update(fields)
        write_json(self.path, self.found)

    def add(self, row: dict[str, Any]) -> None:
        self.found["rows"].append(row)
        self.put()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Exclusive use of the machine, to time something: the other parts are stopped."""
        if self._say is None or self._hear is None:
            yield
            return
        print("quiet", file=self._say, flush=True)
        self._hear.readline()
        try:
            yield
        finally:
            print("done", file=self._say, flush=True)


def write_json(path: Path, content: Any) -> None:
    """Write a file atomically."""
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text)
    os.replace(fresh, path)


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Numbers of tests that passed, failed and were skipped."""
    found = [row["outcome"] for row in rows]
    return {outcome: found.count(outcome) for outcome in ("passed", "failed", "skipped")}


def seconds_since(started: float) -> float:
    """Seconds since `started` (of `time.perf_counter`), to a hundredth."""
    return round(time.perf_counter() - started, 2)


def note(text: str) -> None:
    """Write a line to the part's log."""
    print(text, file=sys.stderr, flush=True)
