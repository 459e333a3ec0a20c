"""Writing whole files: a reader sees the old file or the new one, even if the writer is killed halfway."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

STALE_S = 3600.0
"""Age at which `remove_stale` takes a temporary file for one that a killed process left behind (seconds)."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the block writes there replaces `path` when the block ends.

    Content and name are on disk then. If the block raises, `path` stays as it was. What killed writers of the same
    file left behind is deleted first: it may be gigabytes.
    """
    remove_stale(path.parent, escape(path.name))
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_stale(folder: Path, name: str = "*") -> None:
    """Delete the temporary files of killed writers; one that is being written has changed within `STALE_S`."""
    for temporary in folder.glob(f".{name}-*.tmp"):
        with suppress(FileNotFoundError):  # its writer has just finished
            if time.time() - temporary.stat().st_mtime > STALE_S:
                temporary.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
