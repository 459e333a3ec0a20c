"""Tests as a part: pytest runs in the part's process, and each outcome is stored at once."""

import os
import time
from typing import Any

from .sheet import RESTART, Sheet

# Ignore pytest plugins that happen to be installed.
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
BROKEN = ("CUDA error", "AcceleratorError", "device-side assert")
"""Messages of failures after which CUDA no longer works in the same process."""


class Watch:
    """Pytest plugin that selects a shard of the tests and stores their outcomes."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet
        self.broken = False
        self._written = 0.0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Select this shard's tests of each file, except those that already ran."""
        asked, done = self.sheet.settings, {row["test"] for row in self.sheet.found["rows"]}
        files: dict[Any, list[Any]] = {}
        for item in items:
            files.setdefault(item.path, []).append(item)
        mine = [item for tests in files.values() for item in tests[asked["shard"] :: asked["shards"]]]
        items[:] = [item for item in mine if item.nodeid not in done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Store which test is running, in case the process dies or hangs."""
        self.sheet.put(running=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Store one outcome per test, for setup, call and teardown together."""
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
        self.broken |= report.failed and any(word in str(report.longrepr) for word in BROKEN)

    def pytest_runtest_teardown(self, item: Any) -> None:
        """Stop the session if CUDA no longer works in this process."""
        if self.broken:
            item.session.shouldstop = "CUDA no longer works in this process"


def run_tests(sheet: Sheet) -> int:
    """Run the tests. The exit code asks for a new process if CUDA no longer works in this one."""
    import pytest

    # In a self-test they run on the CPU as far as possible.
    os.environ["LONGTHINK_REHEARSE_GPU"] = str(int(sheet.settings["rehearse"]))
    watch, paths = Watch(sheet), [f"tests/gpu/test_{group}.py" for group in sheet.settings["groups"]]
    # `-p no:cacheprovider`: pytest must not write files of its own.
    code = pytest.main([*paths, "-q", "-p", "no:cacheprovider", "--tb=short", "-m", "gpu"], plugins=[watch])
    sheet.found.pop("running", None)
    sheet.put()
    if watch.broken:
        return RESTART
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        sheet.put(error=f"pytest ended with {code!r}: see the log")
        return 1
    return 0


def _message(report: Any) -> str:
    crash = getattr(getattr(report, "longrepr", None), "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip()[:400]
