"""A group of tests as a part: pytest in the process of the part, every outcome written down as it comes."""

import os
import time
from typing import Any

from .sheet import AGAIN, Sheet

# What else this machine has installed for pytest is none of our business.
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
BROKEN = ("CUDA error", "AcceleratorError", "device-side assert")
"""What a failure says behind which nothing works any more in the same process."""


class Watch:
    """Plugin that takes its share of the tests and writes outcomes into the part's file."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet
        self.again = False
        self._written = 0.0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Every so-maniest test of a file is ours, but for those that were run already."""
        asked, done = self.sheet.settings, {row["test"] for row in self.sheet.found["rows"]}
        files: dict[Any, list[Any]] = {}
        for item in items:
            files.setdefault(item.path, []).append(item)
        mine = [item for tests in files.values() for item in tests[asked["shard"] :: asked["shards"]]]
        items[:] = [item for item in mine if item.nodeid not in done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Say which test runs: where a process dies or hangs, that is the one."""
        self.sheet.put(running=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write an outcome down; a test has one, whatever it consists of."""
        if report.when != "call" and report.passed:
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            row["message"] = _message(report)
        elif report.skipped:
            row["message"] = str(
                report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            )
        self.sheet.found["rows"].append(row)
        if report.failed or time.monotonic() - self._written > 1:
            self.sheet.put()
            self._written = time.monotonic()
        self.again |= report.failed and any(word in str(report.longrepr) for word in BROKEN)

    def pytest_runtest_teardown(self, item: Any) -> None:
        """Leave a process in which the GPU is of no use any more."""
        if self.again:
            item.session.shouldstop = "the GPU does not answer this process any more"


def run_tests(sheet: Sheet) -> int:
    """Run the group; the exit code asks for a new process where this one lost the GPU."""
    import pytest

    # In a self-test they run on the CPU, as far as they can.
    os.environ["LONGTHINK_REHEARSE_GPU"] = str(int(sheet.settings["rehearse"]))
    watch, paths = Watch(sheet), [f"tests/gpu/test_{group}.py" for group in sheet.settings["groups"]]
    # `-p no:cacheprovider`: nothing is written beside what the check writes.
    code = pytest.main([*paths, "-q", "-p", "no:cacheprovider", "--tb=short", "-m", "gpu"], plugins=[watch])
    sheet.found.pop("running", None)
    sheet.put()
    if watch.again:
        return AGAIN
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        sheet.put(error=f"pytest ended with {code!r}: see the log")
        return 1
    return 0


def _message(report: Any) -> str:
    crash = getattr(getattr(report, "longrepr", None), "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip()[:400]
