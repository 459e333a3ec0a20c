"""Write down the launches of the Triton kernels instead of running them. Needs no GPU, and not the interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from longthink.kernels import triton_book, triton_replay, triton_step

KERNELS = (
    (triton_step, "split_kernel"),
    (triton_step, "combine_kernel"),
    (triton_book, "bookkeep_kernel"),
    (triton_book, "move_kernel"),
    (triton_replay, "replay_kernel"),
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
