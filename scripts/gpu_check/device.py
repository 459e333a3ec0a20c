"""The machine: versions, device, memory bandwidth."""

import importlib.metadata
import os
import platform
from statistics import median

import torch

from .sheet import Sheet

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "pytest")


def look_at_device(sheet: Sheet) -> None:
    sheet.put(versions=versions(), machine=machine())
    sheet.put(copy_gb_per_s=round(copy_bandwidth(sheet), 1))


def versions() -> dict[str, str]:
    """Versions of Python, CUDA and the packages that the check depends on."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, object]:
    found: dict[str, object] = {"cores": os.cpu_count(), "device": "CPU: no GPU"}
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found |= {
            "device": about.name,
            "memory_gb": round(about.total_memory / 1e9, 1),
            "multiprocessors": about.multi_processor_count,
            "capability": f"{about.major}.{about.minor}",
        }
    return found


def copy_bandwidth(sheet: Sheet) -> float:
    """GB/s read and written by a copy too large for the caches of a GPU."""
    from .models import device, seconds

    numbers = 1 << 30 if device().type == "cuda" else 1 << 22
    source = torch.empty(numbers, dtype=torch.bfloat16, device=device())
    target = torch.empty_like(source.normal_())
    with sheet.quiet():
        took = [seconds(lambda: [target.copy_(source) for _ in range(4)]) / 4 for _ in range(8)]
    return 2 * source.nbytes / median(took[2:]) / 1e9
