"""How a layer writes its new tokens and reads its pages: by longthink's kernels, or by vLLM's own kernel for CPUs.

Both read pages by block table. Softmax minds no order, and keys carry their positions, so any such kernel reads a
bounded cache right if the only page that is not full, the one just written to, comes last.

Shape suffixes: see `longthink.vllm.pool`; H query heads, G query heads of a KV head, U tables of all rows, row after
row, Q tokens of prompts.
"""

from __future__ import annotations

from itertools import pairwise
from math import gcd
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longthink import kernels
from longthink.kernels.compiled import compile_isolated, mark_dynamic
from longthink.vllm import compat
from longthink.vllm.pool import PagePool, Rows

New = tuple[Tensor, Tensor, Tensor]
"""Query (BHD), key and value (BKD) of new tokens."""


class Prompts(NamedTuple):
    """Parts of prompts that are read in a step.

    Attributes
    ----------
    starts
        Where each request's tokens begin among those of all, and where the last one's end.
    ends
        Tokens that each request has seen when its part is read.
    block_BP, start_B, end_B
        The block tables, and the above as tensors.
    slot_Q
        Block x page size + offset of each token.
    page_block_B, page_filled_B
        Blocks that are written to, and how many tokens each holds then.
    """

    starts: list[int]
    ends: list[int]
    block_BP: Tensor
    start_B: Tensor
    end_B: Tensor
    slot_Q: Tensor
    page_block_B: Tensor
    page_filled_B: Tensor


class Attend(Protocol):
    """One way to write and read."""

    def plan(self, rows: Rows, tail_LBK: Tensor, block_LBK: Tensor) -> Any:
        """What is known before the layers run: tensors."""

    def ready(self, plan: Any) -> Any:
        """What is the same for all layers of a step."""

    def decode(self, layer: int, at: int, plan: Any, new: New, out_BHD: Tensor) -> None:
        """Write one token of each row, and read; `at` is the layer's place in the plan."""

    def plan_prompts(self, prompts: Prompts) -> Any:
        """What is the same for all layers of a step."""

    def prompts(self, layer: int, prompts: Prompts, plan: Any, new: New, out_QHD: Tensor) -> None:
        """Write tokens of prompts, and read causally."""


def tail_last(block_BP: Tensor, count_B: Tensor, tail_LBK: Tensor) -> Tensor:
    """Order of page slots, L x B x K x P, in which the tail changes places with the last slot in use."""
    pages = torch.arange(block_BP.shape[1], device=block_BP.device)
    order = pages.expand(*tail_LBK.shape, -1).clone()
    last_LBK1 = (count_B - 1)[None, :, None, None].expand(*tail_LBK.shape, 1)
    order.scatter_(3, tail_LBK[..., None], last_LBK1)
    return order.scatter_(3, last_LBK1, tail_LBK[..., None])


class _Plan(NamedTuple):
    block_LBKP: Tensor
    length_B: Tensor
    block_LBK: Tensor
    offset_B: Tensor


class KernelAttend:
    """By `longthink.kernels`: Triton on a GPU, torch elsewhere.

    Parameters
    ----------
    scaling
        Factor on q.k.
    compiles
        Make a program of the reading.
    """

    transposed = False

    def __init__(self, pool: PagePool, scaling: float, *, compiles: bool = False) -> None:
        self._pool, self._scaling = pool, scaling
        self._read = compile_isolated(kernels.paged_attention) if compiles else None

    def plan(self, rows: Rows, tail_LBK: Tensor, block_LBK: Tensor) -> _Plan:
        """See `Attend`."""
        order = tail_last(rows.block_BP, rows.count_B, tail_LBK)
        block_LBKP = rows.block_BP[None, :, None].expand(order.shape).gather(3, order)
        page_size = self._pool.page_size
        offset_B = rows.now_B % page_size
        return _Plan(block_LBKP, (rows.count_B - 1) * page_size + offset_B + 1, block_LBK, offset_B)

    def ready(self, plan: _Plan) -> _Plan:
        """See `Attend`."""
        return plan

    def decode(self, layer: int, at: int, plan: _Plan, new: New, out_BHD: Tensor) -> None:
        """See `Attend`."""
        pool = self._pool
        query_BHD, key_BKD, value_BKD = new
        pool.append(layer, plan.block_LBK[at], plan.offset_B, key_BKD, value_BKD)
        paged = kernels.PagedKV(
            pool.keys_LXKTD[layer].transpose(1, 2),
            pool.values_LXKTD[layer].transpose(1, 2),
            plan.block_LBKP[at],
            plan.length_B,
        )
        query_BKGD = query_BHD.unflatten(1, (pool.heads, -1))
        if self._read is None:
            out = kernels.paged_attention(query_BKGD, paged, self._scaling)
        else:
            mark_dynamic(paged.block_BKP, 0, 2)
            mark_dynamic(paged.length_B, 0)
            out = self._read(mark_dynamic(query_BKGD, 0), paged, self._scaling)
        out_BHD.copy_(out.flatten(1, 2))

    def plan_prompts(self, prompts: Prompts) -> None:
        """See `Attend`."""

    def prompts(self, layer: int, prompts: Prompts, plan: None, new: New, out_QHD: Tensor) -> None:
        """See `Attend`."""
        pool = self._pool
        query_QHD, key_QKD, value_QKD = new
        block_Q, offset_Q = prompts.slot_Q // pool.page_size, prompts.slot_Q % pool.page_size
        keys_XTKD, values_XTKD = (x[layer].transpose(1, 2) for x in (pool.keys_LXKTD, pool.values_LXKTD))
        keys_XTKD[block_Q, offset_Q] = key_QKD
        values_XTKD[block_Q, offset_Q] = value_QKD
        for row, ((start, end), seen) in enumerate(zip(pairwise(prompts.starts), prompts.ends, strict=True)):
            blocks = prompts.block_BP[row, : -(-seen // pool.page_size)]
            keys, values = (
                x[blocks].flatten(0, 1)[:seen].transpose(0, 1)[None] for x in (keys_XTKD, values_XTKD)
            )
            position = torch.arange(seen - (end - start), seen, device=keys.device)
            mask = torch.arange(seen, device=keys.device) <= position[:, None]
            query = query_QHD[start:end].transpose(0, 1)[None]
            out = kernels.block_attention(query, keys, values, mask[None, None], self._scaling)
            out_QHD[start:end] = out[0].transpose(0, 1)


class _CpuPlan(NamedTuple):
    block_LUP: Tensor
    slot_LU: Tensor
    length_U: Tensor
    reading: compat.CpuReading | None = None


class CpuAttend:
    """By vLLM's kernel for CPUs, which reads pages in place.

    It has one block table for all heads of a row. Where each KV head has its own, a head of a block is to it a block,
    and a KV head of a row a row: both lie at even distances in memory.
    """

    transposed = True

    def __init__(self, pool: PagePool, scaling: float, heads: int) -> None:
        self._pool, self._scaling, self._heads = pool, scaling, heads
        keys_LXKDT, values = pool.keys_LXKTD.transpose(-1, -2), pool.values_LXKTD
        self._whole = [
            tuple(x.view(*x.shape[:2], pool.page_size, pool.dim) for x in (keys_LXKDT[layer], values[layer]))
            for layer in range(pool.layers)
        ]
        self._caches, self._units_BK = self._whole, None
        if pool.tables > 1:
            per_block, per_head = values.stride(1), values.stride(2)
            unit = gcd(per_block, per_head)
            head = torch.arange(pool.heads)
            self._units_BK = (per_block // unit, per_head // unit * head)
            count = ((values.shape[1] - 1) * per_block + (pool.heads - 1) * per_head) // unit + 1
            self._caches = [
                tuple(
                    x.as_strided((count, 1, pool.page_size, pool.dim), (unit, per_head, pool.dim, 1))
                    for x in pair
                )
                for pair in self._whole
            ]

    def plan(self, rows: Rows, tail_LBK: Tensor, block_LBK: Tensor) -> _CpuPlan:
        """See `Attend`."""
        pool, page_size = self._pool, self._pool.page_size
        offset_B = rows.now_B % page_size
        length_B = (rows.count_B - 1) * page_size + offset_B + 1
        order = tail_last(rows.block_BP, rows.count_B, tail_LBK)
        block_LBKP = rows.block_BP[None, :, None].expand(order.shape).gather(3, order)
        if self._units_BK is not None:
            per_block, head = self._units_BK
            block_LBKP, block_LBK = block_LBKP * per_block + head[:, None], block_LBK * per_block + head
        length_U = length_B[:, None].expand(-1, pool.tables).flatten().to(torch.int32)
        slot_LU = (block_LBK * page_size + offset_B[:, None]).flatten(1)
        return _CpuPlan(block_LBKP.flatten(1, 2).to(torch.int32), slot_LU, length_U)

    def ready(self, plan: _CpuPlan) -> _CpuPlan:
        """See `Attend`."""
        pool, length_U = self._pool, plan.length_U
        start_U = torch.arange(len(length_U) + 1, dtype=torch.int32)
        heads = (self._heads // pool.tables, pool.heads // pool.tables)
        return plan._replace(
            reading=compat.CpuReading(start_U, length_U, *heads, pool.dim, pool.keys_LXKTD.dtype)
        )

    def decode(self, layer: int, at: int, plan: _CpuPlan, new: New, out_BHD: Tensor) -> None:
        """See `Attend`."""
        assert plan.reading is not None
        query, key, value = new
        out, (keys, values) = out_BHD, self._caches[layer]
        if self._units_BK is not None:
            tables = self._pool.tables
            query, out = (x.unflatten(1, (tables, -1)).flatten(0, 1) for x in (query, out))
            key, value = (x.flatten(0, 1)[:, None] for x in (key, value))
        compat.cpu_write(keys, values, key, value, plan.slot_LU[at])
        compat.cpu_read(keys, values, query, out, plan.block_LUP[at], self._scaling, plan.reading)

    def plan_prompts(self, prompts: Prompts) -> compat.CpuReading:
        """See `Attend`."""
        pool = self._pool
        start_B, end_B = (x.to(torch.int32) for x in (prompts.start_B, prompts.end_B))
        return compat.CpuReading(start_B, end_B, self._heads, pool.heads, pool.dim, pool.keys_LXKTD.dtype)

    def prompts(
        self, layer: int, prompts: Prompts, plan: compat.CpuReading, new: New, out_QHD: Tensor
    ) -> None:
        """See `Attend`."""
        query, key, value = new
        keys, values = self._whole[layer]
        compat.cpu_write(keys, values, key, value, prompts.slot_Q)
        compat.cpu_read(keys, values, query, out_QHD, prompts.block_BP.to(torch.int32), self._scaling, plan)
