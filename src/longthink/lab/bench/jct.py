"""Time per token and job completion time against decode length."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from longthink.lab.bench.plan import BLOCK, Plan, Report
from longthink.lab.bench.rows import new_run, quartiles, system_row
from longthink.lab.bench.systems import System, clock, make_systems
from longthink.lab.results.records import Measurement
from longthink.models import Loaded


def blocks_in_all(plan: Plan) -> int:
    systems = len(plan.policies) * (1 + plan.compile) + len(plan.baselines)
    return (len(plan.lengths) + 1) * systems * (plan.repeats + 1)


def measure_jct(
    plan: Plan, loaded: Loaded, report: Report = lambda done, name: None
) -> Iterator[Measurement]:
    """Measure the prefill, and the decode steps that follow each of the plan's lengths, at one length after the
    other.

    All systems share one process and take turns, a block of `BLOCK` steps each, so that a disturbance of the machine
    hits all of them. The first block of a system at a length is warm-up. Time per token is the median over the
    others.

    Job completion time is the prefill plus the time per token integrated over the lengths (trapezoids). A cache that
    has its full size from the first token on takes the same time per token all along.
    """
    lengths = [0, *plan.lengths]
    for one, other in pairwise(lengths):
        if other - one < plan.measured_steps:
            raise ValueError(
                f"lengths={','.join(map(str, plan.lengths))}: between {one} and {other} there is no room for the "
                f"{plan.measured_steps} steps timed at each length ({BLOCK} steps, {plan.repeats} repeats and one "
                "to warm up)"
            )
    torch.set_num_threads(plan.threads)
    systems = make_systems(loaded.model, plan, room=plan.measured_steps)
    run, done = new_run(), 0

    def block_begins(name: str) -> None:
        nonlocal done
        report(done, name)
        done += 1

    before: dict[str, Measurement] = {}
    for length in lengths:
        for system in systems:
            system.go_to(length, fast=plan.fast_forward)
        # Bytes are those before the timed steps.
        rows = [
            system_row(plan, loaded, system, run=run, kind="jct", decode_tokens=length) for system in systems
        ]
        times = take_turns(systems, plan.repeats, block_begins)
        for system, row in zip(systems, rows, strict=True):
            low, middle, high = quartiles(times[system.name])
            timed = replace(row, ms_per_token=middle, ms_per_token_low=low, ms_per_token_high=high)
            before[system.name] = replace(timed, seconds=_seconds(system, timed, before.get(system.name)))
            yield before[system.name]


def take_turns(
    systems: Sequence[System], repeats: int, begins: Callable[[str], None] = lambda name: None
) -> dict[str, list[float]]:
    """Decode blocks in turns; return the mean milliseconds per step of each block but the first."""
    times: dict[str, list[float]] = {system.name: [] for system in systems}
    for turn in range(repeats + 1):
        for system in systems:
            begins(system.name)
            now = clock(system.prompt_BN.device)
            started = now()
            system.decode(BLOCK)
            if turn:
                times[system.name].append((now() - started) * 1000 / BLOCK)
    return times


def _seconds(system: System, row: Measurement, before: Measurement | None) -> float:
    """Time from the start of the prefill to the row's length."""
    assert row.ms_per_token is not None
    if before is None or system.full_size_at_once:
        return system.prefill_seconds + row.decode_tokens * row.ms_per_token / 1000
    assert before.seconds is not None and before.ms_per_token is not None
    mean = (row.ms_per_token + before.ms_per_token) / 2
    return before.seconds + (row.decode_tokens - before.decode_tokens) * mean / 1000
