"""Bytes of the cache and of the process against the decode length, each system in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from longthink.config import Budget
from longthink.errors import BenchError, needs_extra
from longthink.lab.bench.plan import Plan, Report, new_run
from longthink.lab.results.records import Measurement


def measure_memory(plan: Plan, report: Report = lambda done, name: None) -> Iterator[Measurement]:
    """Measure bytes after the prompt and after each of the plan's lengths.

    Every system runs in a fresh process, so that the resident set size is its own. It holds the libraries and the
    model too: what a cache adds is the growth from row to row.

    Yields
    ------
    Measurement
        All lengths of one system, then of the next, as they are measured.

    Raises
    ------
    MissingExtraError
        If psutil is not installed.
    BenchError
        If a process fails; the message has the last line that it wrote.
    """
    with needs_extra("eval"):
        import psutil  # noqa: F401
    run, done = new_run(), 0
    alone = [replace(plan, policies=(), baselines=(name,)) for name in plan.baselines]
    alone += [replace(plan, policies=(spec,), baselines=()) for spec in plan.policies]
    for one in alone:
        name = (*one.baselines, *one.policies)[0]
        report(done, name)
        for row in _in_a_process(one, run):
            done += 1
            report(done, name)
            yield row


def _in_a_process(plan: Plan, run: str) -> Iterator[Measurement]:
    command = [sys.executable, "-m", "longthink.lab.bench.worker"]
    environment = os.environ | {"OMP_NUM_THREADS": str(plan.threads)}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with process.stdin:
                json.dump({"run": run, "plan": asdict(plan)}, process.stdin)
            for line in process.stdout:
                yield Measurement(**json.loads(line))
            if process.wait():
                errors.seek(0)
                last = errors.read().strip().rpartition("\n")[2] or "it wrote no message"
                name = (*plan.baselines, *plan.policies)[0]
                raise BenchError(f"measuring {name!r} ended with code {process.returncode}: {last}")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def plan_from_json(values: dict[str, Any]) -> Plan:
    """Plan that `dataclasses.asdict` took apart."""
    return Plan(**(values | {"budget": Budget(**values["budget"])}))
