"""Running a sweep: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

from contextlib import closing
from functools import partial

from longthink.lab.evaluate.sweep import Sweep
from longthink.lab.evaluate.workers import ProcessWorkers


def run_sweep(sweep: Sweep, *, workers: int | None = None, ray: str | None = None) -> None:
    """Make every sample that is missing, with a model in each of `workers` processes or on a Ray cluster.

    `ray` is an address, ``auto``, or ``local`` for a cluster that ends with the sweep; `workers` then limits its
    tasks at a time. `SweepError` if all workers die; the same call goes on from what is stored.
    """
    if ray is not None:
        # Imports transformers, like `_run_here`.
        from longthink.lab.evaluate.cluster import RayWorkers, connected

        with connected(ray) as module:
            RayWorkers(sweep, module, workers).run()
    elif workers is not None and workers > 1:
        with closing(ProcessWorkers(sweep, workers)) as processes:
            processes.run()
    else:
        _run_here(sweep)
    sweep.store.compact()


def _run_here(sweep: Sweep) -> None:
    # Transformers takes seconds to import, and only the process that has the model needs it.
    from longthink.lab.evaluate.solver import Solver

    with Solver(sweep.plan) as solver:
        sweep.begin(solver.identity)
        while (cache := sweep.assign(0)) is not None:
            for unit, sample in solver.solve(cache, iter(partial(sweep.take, 0), None)):
                sweep.finish(unit, sample)
