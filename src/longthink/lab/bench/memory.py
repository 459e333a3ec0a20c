"""Bytes of the cache and of the process against decode length, each system in a process of its own.

Run as a module this is that process: a plan (JSON) on standard input, one row (JSON) per length on standard output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace

from longthink.config import Budget
from longthink.errors import BenchError, needs_extra
from longthink.lab.bench.models import bench_model
from longthink.lab.bench.plan import Plan, Report
from longthink.lab.bench.rows import new_run, system_row
from longthink.lab.bench.systems import make_systems
from longthink.lab.results.records import Measurement, to_row


def measure_memory(plan: Plan, report: Report = lambda done, name: None) -> Iterator[Measurement]:
    """Measure bytes after the prefill and after each of the plan's lengths.

    The resident set size includes the libraries and the model: the growth from row to row is the cache's.

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
    single = [replace(plan, policies=(), baselines=(name,)) for name in plan.baselines]
    single += [replace(plan, policies=(spec,), baselines=()) for spec in plan.policies]
    for one in single:
        name = (*one.baselines, *one.policies)[0]
        report(done, name)
        for row in _in_a_process(one, name, run):
            done += 1
            report(done, name)
            yield row


def _in_a_process(plan: Plan, name: str, run: str) -> Iterator[Measurement]:
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "longthink.lab.bench.memory"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(plan.threads)},
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
                raise BenchError(f"measuring {name!r} ended with code {process.returncode}: {last}")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _measure_one(plan: Plan, run: str) -> None:
    import psutil
    import torch

    loaded = bench_model(plan.model, device=plan.device, dtype=plan.dtype)
    torch.set_num_threads(plan.threads)
    (system,) = make_systems(loaded.model, plan, room=0, whole=plan.lengths[-1])
    process, device = psutil.Process(), loaded.model.device
    for length in [0, *plan.lengths]:
        system.go_to(length, fast=plan.fast_forward)
        row = system_row(
            plan,
            loaded,
            system,
            run=run,
            kind="memory",
            decode_tokens=length,
            rss_bytes=process.memory_info().rss,
            device_bytes=None if device.type == "cpu" else torch.accelerator.memory_allocated(device),
        )
        print(json.dumps(to_row(row)), flush=True)


def main() -> int:
    """Measure the plan on standard input."""
    job = json.load(sys.stdin)
    values = job["plan"] | {"budget": Budget(**job["plan"]["budget"])}
    try:
        _measure_one(Plan(**values), job["run"])
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
