"""``python -m bench.kernels``: one layer's decode attention on a GPU, bounded with our kernels and dense with others.

Shape suffixes: B rows, H query heads, K KV heads, G query heads per KV head, N tokens, S token slots, P pages,
T tokens in a page, D head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.command import run
from longthink.cli.options import Switch
from longthink.cli.terminal import out_console, write_json
from longthink.cli.text import visible
from longthink.config import check_int
from longthink.environment import hardware, versions
from longthink.errors import BenchError
from longthink.lab.cli.bench import integers

PAGE = 16
HEADS = {"Qwen2.5-7B": (28, 4, 128), "Qwen2.5-1.5B": (12, 2, 128)}
"""Query heads, KV heads and head dim of the models whose shapes are measured."""
STATISTICS = ("nothing", "bound", "mass", "marks")
"""What a step computes beside attention: for windows; raas; raas with exact scores; milestone."""

Call = Callable[[], Any]
Clock = Callable[[Call], float]
"""Returns the milliseconds that a call takes."""


class Case(NamedTuple):
    """One layer's decode step over `tokens` tokens of keys and values."""

    heads: int
    kv_heads: int
    dim: int
    rows: int
    tokens: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values in 16 bits."""
        return 4 * self.rows * self.kv_heads * self.tokens * self.dim


Make = Callable[[Case, torch.device], Call]
"""Prepares a call for a case."""


class KernelTime(NamedTuple):
    """Time of one call; `gb_per_s` counts keys and values only, `of_copy` is its share of the copy bandwidth."""

    model: str
    system: str
    rows: int
    tokens: int
    ms: float
    gb_per_s: float
    of_copy: float


def measure_kernels(
    rows: tuple[int, ...], lengths: tuple[int, ...], budgets: tuple[int, ...]
) -> Iterator[KernelTime]:
    """Measure every system in every case that fits in the memory of the GPU.

    Raises
    ------
    ValueError
        If a number is out of range.
    BenchError
        If there is no GPU or no Triton.
    """
    for field, values in (("rows", rows), ("lengths", lengths), ("budgets", budgets)):
        for value in values:
            check_int(field, value, 1 if field == "rows" else PAGE)
            if field == "budgets" and value % PAGE:
                raise ValueError(f"budgets={value} must be a multiple of the page size, {PAGE}")
    if not torch.cuda.is_available() or find_spec("triton") is None:
        raise BenchError("the kernels need a CUDA GPU with Triton, and there is none here")
    do_bench = import_module("triton.testing").do_bench
    return times(
        rows, lengths, budgets, torch.device("cuda"), lambda call: do_bench(call, return_mode="median")
    )


def times(
    rows: tuple[int, ...],
    lengths: tuple[int, ...],
    budgets: tuple[int, ...],
    device: torch.device,
    clock: Clock,
) -> Iterator[KernelTime]:
    """Measure on a device with a clock."""
    copy = copy_bandwidth(device, clock)
    for model, heads in HEADS.items():
        for count in rows:
            cases = [Case(*heads, count, budget) for budget in budgets]
            for system, case, make in (
                *((f"longthink {name}", case, ours(name)) for case in cases for name in STATISTICS),
                *((name, Case(*heads, count, n), make) for n in lengths for name, make in peers().items()),
            ):
                if device.type == "cuda" and case.kv_bytes > 0.8 * torch.cuda.mem_get_info(device)[0]:
                    continue
                ms = clock(make(case, device))
                speed = case.kv_bytes / ms / 1e6
                yield KernelTime(model, system, case.rows, case.tokens, ms, speed, speed / copy)


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Return GB/s read and written by a copy larger than the caches of a GPU."""
    source = torch.empty(1 << 29 if device.type == "cuda" else 1 << 10, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock(lambda: target.copy_(source)) / 1e6


def ours(statistic: str) -> Make:
    """Return a step of our kernel on a full cache, with one of `STATISTICS`."""

    def make(case: Case, device: torch.device) -> Call:
        from longthink.accelerators import attention
        from longthink.kernels.triton_decode import Slots

        query_BHD, keys, values = _tensors(case, device)
        query_BKGD = query_BHD.unflatten(1, (case.kv_heads, -1))
        shape = (case.rows, case.kv_heads, case.tokens)
        position = torch.arange(case.tokens, dtype=torch.int32, device=device).expand(shape).contiguous()
        now = torch.full((case.rows,), case.tokens - 1, device=device)
        tail = torch.full(shape[:2], case.tokens // PAGE - 1, device=device)
        key_bounds: tuple[Tensor, ...] = ()
        wanted = {"nothing": attention.NOTHING, "bound": attention.BOUND, "mass": attention.MASS}.get(
            statistic
        )
        if statistic == "bound":
            paged = keys.unflatten(2, (-1, PAGE))
            key_bounds = (paged.amin(3), paged.amax(3))
        if wanted is None:
            wanted = attention.marks(torch.zeros(shape, dtype=torch.int8, device=device), 0.5, PAGE)
        slots = Slots(keys, values, position, tail, now, PAGE, *key_bounds)
        key, value = keys[:, :, -1].clone(), values[:, :, -1].clone()
        return lambda: attention.step_attention(query_BKGD, key, value, slots, case.dim**-0.5, wanted)

    return make


def peers() -> dict[str, Make]:
    """Return dense decode attention of the libraries that are installed."""
    found: dict[str, Make] = {"sdpa": _sdpa, "flex": _flex}
    return found | ({"flashinfer": _flashinfer} if find_spec("flashinfer") is not None else {})


def _sdpa(case: Case, device: torch.device) -> Call:
    query, keys, values = _tensors(case, device)
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query[:, :, None], keys, values, enable_gqa=True)


def _flex(case: Case, device: torch.device) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    query, keys, values = _tensors(case, device)
    # On a CPU it is only tested, uncompiled.
    attend = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    return lambda: attend(query[:, :, None], keys, values, enable_gqa=True)


def _flashinfer(case: Case, device: torch.device) -> Call:
    flashinfer = import_module("flashinfer")
    query, keys, values = _tensors(case, device)
    pages = case.tokens // PAGE
    paged = torch.stack(
        [x.transpose(1, 2).reshape(-1, PAGE, case.kv_heads, case.dim) for x in (keys, values)], 1
    )
    del keys, values
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    first = torch.arange(case.rows + 1, dtype=torch.int32, device=device) * pages
    blocks = torch.arange(case.rows * pages, dtype=torch.int32, device=device)
    last = torch.full((case.rows,), PAGE, dtype=torch.int32, device=device)
    shape = (case.heads, case.kv_heads, case.dim, PAGE)
    wrapper.plan(first, blocks, last, *shape, q_data_type=query.dtype, kv_data_type=query.dtype)
    return lambda: wrapper.run(query, paged)


def _tensors(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return random queries BHD, keys BKND and values BKND."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    held = (case.rows, case.kv_heads, case.tokens, case.dim)
    return random(case.rows, case.heads, case.dim), random(*held), random(*held)


def kernels(
    *,
    rows: str = "1,16,64,256",
    lengths: str = "4096,16384,32768,131072",
    budgets: str = "1024,2048,4096",
    json: Switch = False,
) -> int:
    """Measure one layer's decode attention on a GPU: our kernels within budgets, dense ones at lengths.

    Parameters
    ----------
    rows
        Batch sizes, separated by commas.
    lengths
        Tokens that the dense kernels read, separated by commas.
    budgets
        Tokens that ours read, multiples of 16, separated by commas.
    json
        Print one JSON document instead of the table.
    """
    found = measure_kernels(
        integers("rows", rows), integers("lengths", lengths), integers("budgets", budgets)
    )
    if json:
        write_json({"hardware": hardware(), "versions": versions(), "rows": [row._asdict() for row in found]})
        return 0
    console = out_console()
    console.print(f"{'model':<14}{'system':<20}{'rows':>5}{'tokens':>8}{'ms':>10}{'GB/s':>8}  of a copy")
    # A line as soon as it is measured: a run takes minutes.
    for row in found:
        line = (
            f"{row.model:<14}{row.system:<20}{row.rows:>5}{row.tokens:>8}{row.ms:>10.4f}{row.gb_per_s:>8.0f}"
        )
        console.print(visible(f"{line}{row.of_copy:>10.0%}"), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(run(kernels, "bench.kernels"))
