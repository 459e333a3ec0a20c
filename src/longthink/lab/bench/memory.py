"""Bytes of the cache and of the process against decode length, each system in a process of its own.

Run as a module this is that process: it receives a plan and sends one row per length.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace

from longthink.config import Budget
from longthink.errors import BenchError, needs_extra
from longthink.lab.bench.models import bench_model
from longthink.lab.bench.plan import Plan, Report
from longthink.lab.bench.rows import new_run, system_row
from longthink.lab.bench.systems import make_systems
from longthink.lab.processes import Child, ChildDied, Parent, serve
from longthink.lab.results.records import Measurement, to_row


def measure_memory(plan: Plan, report: Report = lambda done, name: None) -> Iterator[Measurement]:
    """Measure bytes after the prefill and after each of the plan's lengths, one system after the other.

    The resident set size includes the libraries and the model: the growth from row to row is the cache's.
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
    child = Child("longthink.lab.bench.memory", env={"OMP_NUM_THREADS": str(plan.threads)})
    try:
        child.send([asdict(plan), run])
        while (row := child.receive()) is not None:
            yield Measurement(**row)
    except ChildDied as death:
        raise BenchError(f"measuring {name!r} ended with {death}") from None
    except Exception as error:
        raise BenchError(f"measuring {name!r} failed: {error}") from error
    finally:
        child.close()


def _measure(parent: Parent) -> None:
    import psutil
    import torch

    values, run = parent.receive()
    plan = Plan(**values | {"budget": Budget(**values["budget"])})
    loaded = bench_model(plan.model, device=plan.device, dtype=plan.dtype)
    torch.set_num_threads(plan.threads)
    (system,) = make_systems(loaded.model, plan, room=0, whole=plan.lengths[-1])
    process, device = psutil.Process(), loaded.model.device
    for length in [0, *plan.lengths]:
        system.go_to(length, fast=plan.fast_forward)
        row = system_row(
            plan, loaded, system, run=run, kind="memory", decode_tokens=length,
            rss_bytes=process.memory_info().rss,
            device_bytes=None if device.type == "cpu" else torch.accelerator.memory_allocated(device),
        )  # fmt: skip
        parent.send(to_row(row))
    parent.send(None)


if __name__ == "__main__":
    serve(_measure)
