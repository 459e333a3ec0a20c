"""Attention of one layer over block tables: with longthink's kernels, or with vLLM's kernel for CPUs.

Softmax ignores the order of keys, and keys carry their rotary position. So any kernel for block tables reads a
bounded cache correctly if the only page that is not full, the one being written, comes last in its table.
Shape suffixes: see `longthink.vllm.pool`; U tables of all rows (row after row), Q prompt tokens.
"""

from itertools import pairwise
from math import gcd
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longthink import kernels
from longthink.kernels.compiled import compile_isolated, mark_dynamic
from longthink.vllm import compat
from longthink.vllm.pool import DecodeBatch, PagePool

QKV = tuple[Tensor, Tensor, Tensor]  # query (BHD), key and value (BKD) of new tokens


class PrefillBatch(NamedTuple):
    """Chunks of prompts to process in a step."""

    starts: list[int]  # offset of each request's tokens among those of the batch, and the total
    ends: list[int]  # prompt tokens of each request that are in the cache after its chunk
    block_BP: Tensor
    slot_Q: Tensor  # block x page size + offset of each token
    page_block_B: Tensor  # blocks that are written to ...
    page_filled_B: Tensor  # ... and the tokens that each then holds


class BlockAttention(Protocol):
    """Writes the new tokens of a layer to their blocks, and attends to the pages of their requests."""

    def plan(self, batch: DecodeBatch, tail_LBK: Tensor, block_LBK: Tensor) -> Any:
        """Compute the tensors that `decode` needs, for all layers."""

    def advance(self, plan: Any) -> Any:
        """The plan of the step after one with the same pages: each token goes to the next slot of its page."""

    def schedule(self, plan: Any) -> Any:
        """Complete a plan with what is not a tensor."""

    def decode(self, layer: int, index: int, plan: Any, new: QKV, out_BHD: Tensor) -> None:
        """Process one token per row; `index` is the layer's index in the plan."""

    def plan_prefill(self, batch: PrefillBatch) -> Any:
        """Compute what `prefill` needs, for all layers."""

    def prefill(self, layer: int, batch: PrefillBatch, plan: Any, new: QKV, out_QHD: Tensor) -> None:
        """Process chunks of prompts, with causal attention."""


class _Plan(NamedTuple):
    block_LBKP: Tensor
    length_B: Tensor
    block_LBK: Tensor
    offset_B: Tensor


def _plan(batch: DecodeBatch, page_size: int, tail_LBK: Tensor, block_LBK: Tensor) -> _Plan:
    """Block tables in which the tail has changed places with the last slot in use, and where each token goes."""
    pages = torch.arange(batch.block_BP.shape[1], device=batch.block_BP.device)
    order = pages.expand(*tail_LBK.shape, -1).clone()
    last_LBK1 = (batch.count_B - 1)[None, :, None, None].expand(*tail_LBK.shape, 1)
    order.scatter_(3, tail_LBK[..., None], last_LBK1)
    order.scatter_(3, last_LBK1, tail_LBK[..., None])
    block_LBKP = batch.block_BP[None, :, None].expand(order.shape).gather(3, order)
    offset_B = batch.now_B % page_size
    return _Plan(block_LBKP, (batch.count_B - 1) * page_size + offset_B + 1, block_LBK, offset_B)


class KernelAttention:
    """Attention with `longthink.kernels`: Triton on a GPU, torch elsewhere."""

    def __init__(self, pool: PagePool, scaling: float, *, compiles: bool = False) -> None:
        self._pool, self._scaling = pool, scaling
        self._compiled = compile_isolated(kernels.paged_attention) if compiles else None

    def plan(self, batch: DecodeBatch, tail_LBK: Tensor, block_LBK: Tensor) -> _Plan:
        return _plan(batch, self._pool.page_size, tail_LBK, block_LBK)

    def advance(self, plan: _Plan) -> _Plan:
        return plan._replace(length_B=plan.length_B + 1, offset_B=plan.offset_B + 1)

    def schedule(self, plan: _Plan) -> _Plan:
        return plan

    def decode(self, layer: int, index: int, plan: _Plan, new: QKV, out_BHD: Tensor) -> None:
        pool = self._pool
        query_BHD, key_BKD, value_BKD = new
        pool.append(layer, plan.block_LBK[index], plan.offset_B, key_BKD, value_BKD)
        keys_XTKD, values_XTKD = self._by_token(layer)
        paged = kernels.PagedKV(keys_XTKD, values_XTKD, plan.block_LBKP[index], plan.length_B)
        query_BKGD = query_BHD.unflatten(1, (pool.heads, -1))
        if self._compiled is None:
            out = kernels.paged_attention(query_BKGD, paged, self._scaling)
        else:
            mark_dynamic(paged.block_BKP, 0, 2)
            mark_dynamic(paged.length_B, 0)
            out = self._compiled(mark_dynamic(query_BKGD, 0), paged, self._scaling)
        out_BHD.copy_(out.flatten(1, 2))

    def plan_prefill(self, batch: PrefillBatch) -> None:
        pass

    def prefill(self, layer: int, batch: PrefillBatch, plan: None, new: QKV, out_QHD: Tensor) -> None:
        page_size = self._pool.page_size
        query_QHD, key_QKD, value_QKD = new
        block_Q, offset_Q = batch.slot_Q // page_size, batch.slot_Q % page_size
        keys_XTKD, values_XTKD = self._by_token(layer)
        keys_XTKD[block_Q, offset_Q] = key_QKD
        values_XTKD[block_Q, offset_Q] = value_QKD
        for row, ((start, end), seen) in enumerate(zip(pairwise(batch.starts), batch.ends, strict=True)):
            blocks = batch.block_BP[row, : -(-seen // page_size)]
            keys, values = (
                x[blocks].flatten(0, 1)[:seen].transpose(0, 1)[None] for x in (keys_XTKD, values_XTKD)
            )
            position = torch.arange(seen - (end - start), seen, device=keys.device)
            mask = torch.arange(seen, device=keys.device) <= position[:, None]
            query = query_QHD[start:end].transpose(0, 1)[None]
            out = kernels.block_attention(query, keys, values, mask[None, None], self._scaling)
            out_QHD[start:end] = out[0].transpose(0, 1)

    def _by_token(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, XTKD."""
        pool = self._pool
        return pool.keys_LXKTD[layer].transpose(1, 2), pool.values_LXKTD[layer].transpose(1, 2)


class _CpuPlan(NamedTuple):
    block_LUP: Tensor
    slot_LU: Tensor
    length_U: Tensor
    schedule: compat.CpuSchedule | None = None


class CpuAttention:
    """Attention with vLLM's kernel for CPUs. The pool must store keys transposed.

    The kernel takes one block table per row. If each KV head has its own table, every head of a block is passed as a
    block and every KV head of a row as a row, which works because both are evenly spaced in memory.
    """

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
            shape, strides = (count, 1, pool.page_size, pool.dim), (unit, per_head, pool.dim, 1)
            self._caches = [tuple(x.as_strided(shape, strides) for x in pair) for pair in self._whole]

    def plan(self, batch: DecodeBatch, tail_LBK: Tensor, block_LBK: Tensor) -> _CpuPlan:
        pool = self._pool
        block_LBKP, length_B, _, offset_B = _plan(batch, pool.page_size, tail_LBK, block_LBK)
        if self._units_BK is not None:
            per_block, head = self._units_BK
            block_LBKP, block_LBK = block_LBKP * per_block + head[:, None], block_LBK * per_block + head
        length_U = length_B[:, None].expand(-1, pool.tables).flatten().to(torch.int32)
        slot_LU = (block_LBK * pool.page_size + offset_B[:, None]).flatten(1)
        return _CpuPlan(block_LBKP.flatten(1, 2).to(torch.int32), slot_LU, length_U)

    def advance(self, plan: _CpuPlan) -> _CpuPlan:
        return plan._replace(slot_LU=plan.slot_LU + 1, length_U=plan.length_U + 1)

    def schedule(self, plan: _CpuPlan) -> _CpuPlan:
        pool, length_U = self._pool, plan.length_U
        start_U = torch.arange(len(length_U) + 1, dtype=torch.int32)
        heads, kv_heads = self._heads // pool.tables, pool.heads // pool.tables
        schedule = compat.CpuSchedule(start_U, length_U, heads, kv_heads, pool.dim, pool.keys_LXKTD.dtype)
        return plan._replace(schedule=schedule)

    def decode(self, layer: int, index: int, plan: _CpuPlan, new: QKV, out_BHD: Tensor) -> None:
        assert plan.schedule is not None
        query, key, value = new
        out, (keys, values) = out_BHD, self._caches[layer]
        if self._units_BK is not None:
            tables = self._pool.tables
            query, out = (x.unflatten(1, (tables, -1)).flatten(0, 1) for x in (query, out))
            key, value = (x.flatten(0, 1)[:, None] for x in (key, value))
        compat.cpu_write(keys, values, key, value, plan.slot_LU[index])
        plan.schedule.attend(keys, values, query, out, plan.block_LUP[index], self._scaling)

    def plan_prefill(self, batch: PrefillBatch) -> compat.CpuSchedule:
        pool = self._pool
        start_B, end_B = (torch.tensor(x, dtype=torch.int32) for x in (batch.starts, batch.ends))
        return compat.CpuSchedule(start_B, end_B, self._heads, pool.heads, pool.dim, pool.keys_LXKTD.dtype)

    def prefill(
        self, layer: int, batch: PrefillBatch, plan: compat.CpuSchedule, new: QKV, out_QHD: Tensor
    ) -> None:
        query, key, value = new
        keys, values = self._whole[layer]
        compat.cpu_write(keys, values, key, value, batch.slot_Q)
        plan.attend(keys, values, query, out_QHD, batch.block_BP.to(torch.int32), self._scaling)
