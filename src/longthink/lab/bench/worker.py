"""One system in a process of its own: a plan on standard input, a row of JSON for each length on standard output."""

from __future__ import annotations

import json
import sys

from longthink.lab.bench.memory import plan_from_json
from longthink.lab.bench.models import bench_model
from longthink.lab.bench.plan import Plan, Rows
from longthink.lab.results.records import to_row


def main() -> int:
    """Run the plan of standard input."""
    job = json.load(sys.stdin)
    try:
        _run(plan_from_json(job["plan"]), job["run"])
    except KeyboardInterrupt:
        return 130
    return 0


def _run(plan: Plan, run: str) -> None:
    import psutil
    import torch

    from longthink.lab.bench.systems import make_systems

    torch.set_num_threads(plan.threads)
    loaded = bench_model(plan.model, device=plan.device, dtype=plan.dtype)
    torch.set_num_threads(plan.threads)
    (system,) = make_systems(loaded.model, plan, room=0, whole=plan.lengths[-1])
    rows, process = Rows(plan, "memory", loaded, run), psutil.Process()
    on_cpu = loaded.model.device.type == "cpu"
    for length in [0, *plan.lengths]:
        system.go_to(length, fast=plan.fast_forward)
        row = rows.make(
            system,
            decode_tokens=length,
            rss_bytes=process.memory_info().rss,
            device_bytes=None if on_cpu else torch.accelerator.memory_allocated(loaded.model.device),
        )
        print(json.dumps(to_row(row)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
