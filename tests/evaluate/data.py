"""The real problem files, where there are any."""

import json
import os
from pathlib import Path

import pytest


def problem_file(name: str) -> Path:
    """A file of the folder LONGTHINK_DATA; tests that need it are skipped without it."""
    folder = os.environ.get("LONGTHINK_DATA")
    if not folder:
        pytest.skip("LONGTHINK_DATA names no folder with problem files")
    return Path(folder) / name


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
