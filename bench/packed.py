"""Time of one layer's attention over packed pages, beside slots in full: as many tokens, and as many bytes.

    python -m bench.packed [--tokens 16384] [--kv-heads 8] [--group 1] [--head-dim 64]

Compiled, one row, one thread, CPU time; random keys and values. Prints a row for each format.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from longthink import kernels
from longthink.config import PACKED_BITS
from longthink.kernels import packing
from longthink.kernels.compiled import compile_isolated

PAGE, WINDOW, ROUNDS = 32, 64, 40


def milliseconds(call: Callable[[], object]) -> float:
    """Lower quartile of the CPU time of a call, after some to warm up."""
    times = []
    for _ in range(ROUNDS + 5):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return statistics.quantiles(times[5:], n=4)[0]


def in_full(query: Tensor, keys: Tensor, values: Tensor, resident: Tensor) -> Tensor:
    return kernels.decode_attention(query, keys, values, resident, 0.125, with_weights=True)[0]


def at_few_bits(
    query: Tensor, near: tuple[Tensor, Tensor], packed: tuple[Tensor, ...], order: Tensor, resident: Tensor
) -> Tensor:
    pages = packing.PackedPages(*packed)
    return kernels.tiered_attention(query, near, pages, order, resident, PAGE, 0.125)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("tokens", 16384), ("kv-heads", 8), ("group", 1), ("head-dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads, dim, tokens = asked.kv_heads, asked.head_dim, asked.tokens
    query = torch.randn(1, heads, asked.group, dim)

    def measure_full(count: int, dtype: torch.dtype) -> float:
        keys, values = torch.randn(2, 1, heads, count, dim).to(dtype)
        program = compile_isolated(in_full, dynamic=False)
        return milliseconds(
            partial(program, query, keys, values, torch.ones(1, heads, count, dtype=torch.bool))
        )

    print("| format | KiB | ms | as many bytes in full, bfloat16: ms |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        held = 2 * heads * tokens * dim * dtype.itemsize
        print(f"| {dtype} | {held >> 10} | {measure_full(tokens, dtype):.2f} | |", flush=True)
    keys, values = torch.randn(2, 1, heads, tokens // PAGE, PAGE, dim)
    near = torch.randn(2, 1, heads, WINDOW, dim).bfloat16()
    order = torch.randperm(dim).expand(1, heads, -1)
    for bits in PACKED_BITS:
        packed = tuple(packing.pack(keys, values, bits, bits, order))
        held = sum(tensor.nbytes for tensor in packed) + near.nbytes
        resident = torch.ones(1, heads, tokens + WINDOW, dtype=torch.bool)
        program = compile_isolated(at_few_bits, dynamic=False)
        took = milliseconds(partial(program, query, (near[0], near[1]), packed, order, resident))
        alike = measure_full(held // (4 * heads * dim), torch.bfloat16)
        print(f"| {bits} bits | {held >> 10} | {took:.2f} | {alike:.2f} |", flush=True)


if __name__ == "__main__":
    main()
