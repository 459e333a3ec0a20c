"""Versions and hardware, recorded with each result."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path


def versions() -> dict[str, str]:
    import torch
    import transformers

    from longthink import __version__

    return {
        "longthink": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def hardware() -> dict[str, str | int]:
    import torch

    found: dict[str, str | int] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": cores(),
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
