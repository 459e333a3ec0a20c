"""What a part has found so far: in a file of its own from the first number on, so that nothing of it can be lost."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

AGAIN = 75
"""Exit code of a part that wants to go on in a new process."""


class Sheet:
    """The findings of one part, and its line to the process that runs all parts.

    Parameters
    ----------
    path
        File of the part. What it holds is gone on with.
    settings
        What the part is asked to do.
    say, hear
        Where `quiet` asks, and where it is answered; None for nobody.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], say: TextIO | None = None, hear: TextIO | None = None
    ) -> None:
        self.path, self.settings = path, settings
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
        self._say, self._hear = say, hear

    def put(self, **fields: Any) -> None:
        """Write down what holds for the whole part."""
        self.found.update(fields)
        write_json(self.path, self.found)

    def add(self, row: dict[str, Any]) -> None:
        """Write down one more row."""
        self.found["rows"].append(row)
        self.put()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Have the machine to itself while something is timed: the other parts stand still."""
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
    """Write a file that is never seen half written."""
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, text: str) -> None:
    """As `write_json`, any text."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text)
    os.replace(fresh, path)


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many tests passed, failed and were skipped."""
    found = [row["outcome"] for row in rows]
    return {outcome: found.count(outcome) for outcome in ("passed", "failed", "skipped")}


def seconds_since(started: float) -> float:
    """Seconds since a time of `time.perf_counter`, to a hundredth."""
    return round(time.perf_counter() - started, 2)


def note(text: str) -> None:
    """Write a line to the log of the part."""
    print(text, file=sys.stderr, flush=True)
