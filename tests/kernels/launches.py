"""Write down the launches of the Triton kernels instead of running them. Needs no GPU, and not the interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from longthink.accelerators import triton_tables
from longthink.kernels import triton_decode

KERNELS = (
    (triton_decode, "split_kernel"),
    (triton_decode, "combine_kernel"),
    (triton_tables, "evict_kernel"),
    (triton_tables, "move_kernel"),
)


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches of the ``with`` block."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                found.append(Launch(self.kernel, grid, arguments, options))

            return launch

    with pytest.MonkeyPatch.context() as patch:
        for module, name in KERNELS:
            patch.setattr(module, name, Recorder(getattr(module, name)))
        yield found
