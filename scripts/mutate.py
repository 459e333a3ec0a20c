"""Break the code in many small ways, one at a time, and see whether a test notices: does the suite still prove it?

    .venv/bin/python scripts/mutate.py [--only WORD] [--quick] [--checkout FOLDER]

The mutations stand in `mutations.toml` beside this file: a text that stands once in a file of `src/longthink`, what
takes its place, and the test files that should fail, the quickest first. Of those the quick tests run first, and the
slow ones where none of these has failed. With ``--checkout`` code and tests of another checkout take part, such as
those before a change of the tests. It refuses a checkout with changes, and puts each file back whatever happens.

Prints a row for each mutation, and ends with 1 if one has not been seen: it has survived, or its tests did not run
(they need a package that is not here, or the code cannot be imported any more).
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

# What takes seconds to import is there once, and each run of tests begins as a copy of this process.
import pytest
import torch
import transformers  # noqa: F401

HERE = Path(__file__).resolve().parent
PATIENCE = 900
"""Seconds after which a test run counts as failed: a mutation may never end."""


def read() -> dict[str, dict]:
    """The mutations by their names."""
    with (HERE / "mutations.toml").open("rb") as file:
        return tomllib.load(file)


def check_clean(checkout: Path) -> None:
    command = ["git", "-C", str(checkout), "status", "--porcelain"]
    if changed := subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip():
        sys.exit(f"{checkout} has changes, and mutations must not mix with them:\n{changed}")


@contextmanager
def mutated(checkout: Path, mutation: dict) -> Iterator[None]:
    """Have one place of the code changed for a while."""
    path = checkout / "src" / "longthink" / mutation["file"]
    before = path.read_text()
    if before.count(mutation["old"]) != 1:
        sys.exit(f"{path} must have this once: {mutation['old']}")
    try:
        path.write_text(before.replace(mutation["old"], mutation["new"]))
        yield
    finally:
        path.write_text(before)


class NotRun(Exception):
    """Tests could not be collected, which says nothing of a mutation."""


def first_failure(checkout: Path, tests: list[str], marks: str) -> str | None:
    """The first test that fails, or that none ended; None if all pass. `NotRun` if they cannot be collected."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        child = os.fork()
        if child == 0:
            run_pytest(checkout, ["-m", marks, *tests], said)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.alarm(PATIENCE)
        _, status = os.waitpid(child, 0)
        signal.alarm(0)
        output = said.read_text()
    if os.WIFSIGNALED(status):
        return "does not end"
    code = os.waitstatus_to_exitcode(status)
    if code in (0, 5):  # 5: no test has these marks
        return None
    named = re.search(r"^(?:FAILED|ERROR) (\S+::\S+)", output, re.MULTILINE)
    if named is None:
        raise NotRun(f"pytest ends with {code}")
    return named[1].removeprefix("tests/")


def run_pytest(checkout: Path, arguments: list[str], said: Path) -> NoReturn:
    """Run tests in this process, a child that nothing comes back from; it has not imported our package yet."""
    code: int = pytest.ExitCode.INTERNAL_ERROR
    try:
        os.chdir(checkout)
        sys.path.insert(0, str(checkout / "src"))
        os.environ["PYTHONPATH"] = str(checkout / "src")
        # What random tests have found in another run does not count here.
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(said.parent / "examples")
        output = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])
        sys.stdout.flush()
    finally:
        os._exit(code)


def killer(checkout: Path, mutation: dict, *, quick: bool) -> str | None:
    """The test that sees a mutation, with the time that this took; None if it survives."""
    began = time.monotonic()
    with mutated(checkout, mutation):
        for marks in ("not slow",) if quick else ("not slow", "slow"):
            if failure := first_failure(checkout, mutation["tests"], marks):
                return (
                    f"{failure} ({'quick' if marks != 'slow' else 'slow'}, {time.monotonic() - began:.0f} s)"
                )
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutations whose name has this word")
    parser.add_argument("--quick", action="store_true", help="leave the slow tests out")
    parser.add_argument("--checkout", type=Path, default=HERE.parent)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # A file is put back then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    checkout = arguments.checkout.resolve()
    check_clean(checkout)
    chosen = {name: mutation for name, mutation in read().items() if arguments.only in name}
    survivors = []
    for name, mutation in chosen.items():
        try:
            seen_by, row = killer(checkout, mutation, quick=arguments.quick), "SURVIVES"
        except NotRun as why:
            seen_by, row = None, f"NOT RUN: {why}"
        survivors += [] if seen_by else [name]
        print(f"| {name} | {seen_by or row} |", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations were seen")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
