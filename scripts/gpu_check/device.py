"""What the machine is: names, versions, and the bandwidth of its memory."""

import importlib.metadata
import os
import platform
from statistics import median

import torch

from .sheet import Sheet

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "pytest")


def look_at_device(sheet: Sheet) -> None:
    """Write down what there is, and how fast a copy is."""
    sheet.put(versions=versions(), machine=machine())
    sheet.put(copy_gb_per_s=round(copy_bandwidth(sheet), 1))


def versions() -> dict[str, str]:
    """Return the versions of Python and of what the check runs on."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, object]:
    """Return name and size of the device."""
    found: dict[str, object] = {"cores": os.cpu_count(), "device": "CPU: no GPU here"}
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
    """GB/s read and written by a copy that no cache of a GPU holds."""
    from .models import device, seconds

    numbers = 1 << 30 if device().type == "cuda" else 1 << 22
    source = torch.empty(numbers, dtype=torch.bfloat16, device=device())
    target = torch.empty_like(source.normal_())
    with sheet.quiet():
        took = [seconds(lambda: [target.copy_(source) for _ in range(4)]) / 4 for _ in range(8)]
    return 2 * source.nbytes / median(took[2:]) / 1e9
