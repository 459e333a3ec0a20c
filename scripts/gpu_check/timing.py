"""Times of decode steps, in blocks of one page: one step of each block opens pages."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .models import Head, seconds, synchronize

BLOCK = 16
"""Steps that are timed together: the page size of the measured policies."""
Decode = Callable[[int], None]
"""Decodes that many tokens."""


def time_steps(decode: Decode, blocks: int) -> dict[str, float]:
    """Milliseconds per step, including the opening of pages.

    `host_ms` is the time until the host has launched a step. If it is as long as the step, the device waits for the
    host, and the times do not show the kernels.
    """
    took, launched = [], []
    decode(2 * BLOCK)
    for _ in range(blocks):
        synchronize()
        started = time.perf_counter()
        decode(BLOCK)
        launched.append(time.perf_counter() - started)
        synchronize()
        took.append(time.perf_counter() - started)
    return {
        "ms": round(median(took) / BLOCK * 1e3, 4),
        "ms_least": round(min(took) / BLOCK * 1e3, 4),
        "ms_most": round(max(took) / BLOCK * 1e3, 4),
        "host_ms": round(median(launched) / BLOCK * 1e3, 4),
    }


@torch.no_grad()
def head_ms(model: Any, token_B1: Tensor) -> float:
    """Milliseconds per step outside the layers, as a CUDA graph on a GPU."""
    head, token_B1 = Head(model), token_B1.clone()
    run: Callable[[], Any] = lambda: head(token_B1)  # noqa: E731
    if token_B1.is_cuda:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    took = [seconds(lambda: [run() for _ in range(BLOCK)]) for _ in range(8)]
    return round(median(took[2:]) / BLOCK * 1e3, 4)


def kernel_times(decode: Decode, most: int = 15) -> list[dict[str, Any]]:
    """The slowest operations according to the profiler: name, calls and milliseconds per step."""
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        decode(BLOCK)
        synchronize()
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: getattr(event, field), reverse=True)
    return [
        {
            "name": event.key[:80],
            "calls": round(event.count / BLOCK, 2),
            "ms": round(getattr(event, field) / BLOCK / 1e3, 4),
        }
        for event in events[:most]
    ]


def all_layers_ms(ms: float, outside_ms: float, asked: dict[str, Any]) -> float:
    """Milliseconds with all layers: measured, or scaled by layers; time outside the layers counts once."""
    if asked["layers"] == asked["layers_of"]:
        return ms
    return round(outside_ms + (ms - outside_ms) * asked["layers_of"] / asked["layers"], 4)


def start_of_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """Most bytes allocated on the GPU since `start_of_peak`; None without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
