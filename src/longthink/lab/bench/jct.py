"""Time per token and job completion time against the decode length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from longthink.lab.bench.plan import BLOCK, Plan, Report, Rows, new_run
from longthink.lab.bench.systems import System, clock, make_systems

if TYPE_CHECKING:
    from longthink.lab.results.records import Measurement
    from longthink.models import Loaded


def blocks_in_all(plan: Plan) -> int:
    """Number of blocks that `measure_jct` decodes."""
    systems = len(plan.policies) * (1 + plan.compile) + len(plan.baselines)
    return (len(plan.lengths) + 1) * systems * (plan.repeats + 1)


def measure_jct(
    plan: Plan, loaded: Loaded, report: Report = lambda done, name: None
) -> Iterator[Measurement]:
    """Measure the time of the steps that follow each of the plan's lengths, and the prompt.

    All systems stand side by side in one process and take turns, a block of `BLOCK` steps each, so that what
    disturbs the machine disturbs all of them. The first block of a system at a length warms it up and is not
    counted. A row's time per token is the median over the other blocks of the mean over a block.

    Job completion time is the time of the prompt and the time per token, added up over the lengths (trapezoids). A
    system whose cache has its full size from the first token on has the same time per token all along.

    Yields
    ------
    Measurement
        All systems at one length, then all at the next.

    Raises
    ------
    ValueError
        If two lengths are closer than the steps that are timed at each.
    """
    lengths = [0, *plan.lengths]
    _check_gaps(plan, lengths)
    torch.set_num_threads(plan.threads)
    systems = make_systems(loaded.model, plan, room=plan.measured_steps)
    rows = Rows(plan, "jct", loaded, new_run())
    done = 0

    def step(name: str) -> None:
        nonlocal done
        report(done, name)
        done += 1

    before: dict[str, Measurement] = {}
    for length in lengths:
        for system in systems:
            system.go_to(length, fast=plan.fast_forward)
        ready = [rows.make(system, decode_tokens=length) for system in systems]
        times = take_turns(systems, plan.repeats, step)
        for system, row in zip(systems, ready, strict=True):
            low, middle, high = (
                torch.tensor(times[system.name]).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            )
            timed = replace(row, ms_per_token=middle, ms_per_token_low=low, ms_per_token_high=high)
            before[system.name] = replace(timed, seconds=_seconds(system, timed, before.get(system.name)))
            yield before[system.name]


def take_turns(
    systems: Sequence[System], repeats: int, step: Callable[[str], None] = lambda name: None
) -> dict[str, list[float]]:
    """Let systems decode blocks in turns, and return the mean milliseconds per step of each block but the first."""
    times: dict[str, list[float]] = {system.name: [] for system in systems}
    for turn in range(repeats + 1):
        for system in systems:
            step(system.name)
            now = clock(system.prompt_BN.device)
            started = now()
            system.decode(BLOCK)
            if turn:
                times[system.name].append((now() - started) * 1000 / BLOCK)
    return times


def _seconds(system: System, row: Measurement, before: Measurement | None) -> float:
    """Time from the prompt to the row's length."""
    assert row.ms_per_token is not None
    if before is None or system.full_size_at_once:
        return system.prefill_seconds + row.decode_tokens * row.ms_per_token / 1000
    assert before.seconds is not None and before.ms_per_token is not None
    mean = (row.ms_per_token + before.ms_per_token) / 2
    return before.seconds + (row.decode_tokens - before.decode_tokens) * mean / 1000


def _check_gaps(plan: Plan, lengths: Sequence[int]) -> None:
    for one, other in pairwise(lengths):
        if other - one < plan.measured_steps:
            raise ValueError(
                f"lengths={','.join(map(str, plan.lengths))}: from {one} to {other} there is no room for the "
                f"{plan.measured_steps} steps that are timed at each length ({BLOCK} steps, {plan.repeats} repeats "
                "and one to warm up)"
            )
