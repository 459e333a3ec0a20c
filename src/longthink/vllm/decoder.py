"""The decode step over blocks of the pool, for all layers of a worker.

`begin` opens pages and evicts before the layers run, `finish` lets the policy observe afterwards, both for all
layers at once, so a step launches few operations. Policies that need attention weights observe a page when it is
full (`longthink.vllm.observe`). Nothing here reads a value back from the device. Shape suffixes: see
`longthink.vllm.pool`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from longthink.cache.step import choose_slots
from longthink.kernels.compiled import compile_isolated, mark_dynamic
from longthink.policies import Milestone, Moves, Policy, RaaS, SavesTokens, Step, reads_vectors
from longthink.vllm.attention import QKV, BlockAttention
from longthink.vllm.observe import ObserveOptions, observe_page
from longthink.vllm.pool import DecodeBatch, PagePool

SKIPS_ADMIT: frozenset[type[Policy]] = frozenset({Milestone, RaaS})
"""Policies, by exact class, whose `admit` has no effect while the prompt is pinned."""


class DecodeContext(NamedTuple):
    programs: _Programs
    span: slice  # the layers that it covers: all of them, or one
    batch: DecodeBatch
    active_B: Tensor  # False for a prompt token processed on its own: the policy does not observe it
    block_LBK: Tensor  # block that each token is written to
    plan: Any  # from `BlockAttention.schedule`


class BlockDecoder:
    """Decode steps of some layers, of at most `max_rows` requests.

    `static_buffers` keeps the tensors that the layers read at fixed addresses, so that their work can be captured as
    a CUDA graph.
    """

    def __init__(
        self, pool: PagePool, policies: list[Policy], attention: BlockAttention, options: ObserveOptions,
        max_rows: int, *, compiles: bool = False, static_buffers: bool = False,
    ) -> None:  # fmt: skip
        self.pool, self.attention = pool, attention
        self._policies, self._options = policies, options
        device, policy = pool.position_LXKT.device, pool.policy
        self._layers = torch.arange(pool.layers, device=device)
        self._moves = isinstance(policy, SavesTokens)
        self._needs_weights = "weights" in policy.needs
        # A policy without state has nothing to observe.
        self._observes = bool(pool.state)
        self.admits = self._observes and type(policy) not in SKIPS_ADMIT
        self._programs = _Programs(*map(compile_isolated, _EAGER)) if compiles else _EAGER
        self._buffers = _StaticBuffers(max_rows) if static_buffers else None
        self._widens, dtype = pool.kmin_LXKD is not None, pool.keys_LXKTD.dtype
        shapes = (
            (max_rows if self._observes else 0, options.heads),
            (max_rows if self._widens else 0, pool.heads),
        )
        self._query_LBHD, self._key_LBKD = (
            torch.zeros(pool.layers, *shape, pool.dim, dtype=dtype, device=device) for shape in shapes
        )

    def begin(
        self, batch: DecodeBatch, *, opening: Tensor | None, evicts: bool, admitting: Tensor | None = None,
        layer: int | None = None,
    ) -> DecodeContext:  # fmt: skip
        """Assign a block to each token, in all layers or in one.

        `opening` are the rows whose token opens a page, `admitting` those whose token is the first after the prompt
        (only if `admits`). `evicts` is False if it is known that each of them has an empty slot.
        """
        span = slice(0, self.pool.layers) if layer is None else slice(layer, layer + 1)
        # Steps of a single layer are too rare to be worth compiling.
        programs = self._programs if layer is None else _EAGER
        if admitting is not None:
            self._admit(span, batch.take(admitting))
        if opening is not None:
            self._open_pages(programs, span, batch.take(opening), evicts=evicts)
        layers = self._layers[span]
        block_LBK, plan = programs.locate(self.pool, self.attention, layers, batch.mark_dynamic())
        self.pool.write_positions(layers, block_LBK, batch.now_B)
        active_B = batch.now_B >= batch.prompt_B
        if self._buffers is not None and layer is None:
            active_B, block_LBK = self._buffers("own", active_B, block_LBK)
            batch = DecodeBatch(*self._buffers("batch", *batch))
            plan = type(plan)(*self._buffers("plan", *plan))
        return DecodeContext(programs, span, batch, active_B, block_LBK, self.attention.schedule(plan))

    def advance(self, before: DecodeContext, now_B: Tensor) -> DecodeContext:
        """Begin the step after `before` without looking anything up: all rows decode, and none opens a page."""
        self.pool.write_positions(self._layers[before.span], before.block_LBK, now_B)
        plan = self.attention.schedule(self.attention.advance(before.plan))
        return before._replace(batch=before.batch._replace(now_B=now_B), plan=plan)

    def _admit(self, span: slice, batch: DecodeBatch) -> None:
        pages_B = (batch.now_B + self.pool.page_size - 1) // self.pool.page_size
        for part in self._parts(span, single=True):
            table = self.pool.table(self._layers[part], batch, pages_B)
            self._policies[part.start].admit(table, None)
            all_B = torch.ones_like(batch.now_B, dtype=torch.bool)
            self.pool.store_state(self._layers[part], batch, table.state, all_B)

    def _open_pages(self, programs: _Programs, span: slice, batch: DecodeBatch, *, evicts: bool) -> None:
        pool, options = self.pool, self._options if self._needs_weights else None
        if not evicts and options is None:
            # Slots fill in order while there are empty ones.
            slot_LBK = _filled(pool, batch)[None, :, None].expand(span.stop - span.start, -1, pool.tables)
            pool.clear_pages(self._layers[span], _blocks(batch, slot_LBK), batch.now_B)
            return
        # One layer at a time where the keys of whole tables are gathered: for all layers they would not fit.
        for part in self._parts(span, single=self._moves or options is not None):
            layers, policy = self._layers[part], self._policies[part.start]
            chosen = programs.choose(pool, policy, layers, batch.mark_dynamic(), options, evicts=evicts)
            if chosen.state is not None:
                pool.store_state(layers, batch, chosen.state, batch.now_B > batch.prompt_B)
            if chosen.moves is not None:
                pool.move_tokens(layers, batch, chosen.moves)
            pool.clear_pages(layers, chosen.block_LBK, batch.now_B)

    def _parts(self, span: slice, *, single: bool) -> list[slice]:
        """Group layers that can be processed together: all of them if their policies are equal."""
        if not single and all(policy == self._policies[0] for policy in self._policies):
            return [span]
        return [slice(i, i + 1) for i in range(span.start, span.stop)]

    def layer(self, context: DecodeContext, layer: int, new: QKV, out_BHD: Tensor) -> None:
        self.attention.decode(layer, layer - context.span.start, context.plan, new, out_BHD)
        count = len(out_BHD)
        if self._observes:
            self._query_LBHD[layer, :count].copy_(new[0])
        if self._widens:
            self._key_LBKD[layer, :count].copy_(new[1])

    def finish(self, context: DecodeContext) -> None:
        """Let the policies observe the step once all layers have run, or store its queries for later."""
        batch, span = context.batch, context.span
        layers, count = self._layers[span], len(batch.now_B)
        if self._widens:
            self.pool.widen_bounds(layers, context.block_LBK, batch.now_B, self._key_LBKD[span, :count])
        if self._needs_weights:
            self.pool.write_queries(layers, batch, self._query_LBHD[span, :count])
        elif self._observes:
            for part in self._parts(span, single=False):
                query_LBHD = mark_dynamic(self._query_LBHD[part, :count], 1)
                step = Step(query_LBHD, None, self._options.scaling, self._options.over_ranks)
                state = context.programs.observe(
                    self.pool, self._policies[part.start], self._layers[part], batch, step
                )
                self.pool.store_state(self._layers[part], batch, state, context.active_B)


class _StaticBuffers:
    """Copies of tensors at addresses that stay the same from step to step, for up to `max_rows` rows."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, *tensors: Tensor) -> list[Tensor]:
        """Copy tensors into their buffers; rows are dimension 1 of tensors with layers, else 0."""
        copies = []
        for index, tensor in enumerate(tensors):
            dim = int(tensor.ndim > 2)
            if (name, index) not in self._buffers:
                shape = [*tensor.shape[:dim], self._max_rows, *tensor.shape[dim + 1 :]]
                self._buffers[name, index] = tensor.new_zeros(shape)
            buffer = self._buffers[name, index].narrow(dim, 0, tensor.shape[dim])
            copies.append(buffer.copy_(tensor))
        return copies


# Pure functions, which can be compiled: they do not write to the pool.


def _locate(
    pool: PagePool, attention: BlockAttention, layers: Tensor, batch: DecodeBatch
) -> tuple[Tensor, Any]:
    """Block that each token is written to, L x B x K, and the plan of the attention."""
    tail_LBK = pool.tail_slots(layers, batch)
    block_LBK = _blocks(batch, tail_LBK)
    return block_LBK, attention.plan(batch, tail_LBK, block_LBK)


class _Choice(NamedTuple):
    """The policy's state if it has observed, the blocks of the new pages (L x B x K), tokens to move beforehand."""

    state: dict[str, Tensor] | None
    block_LBK: Tensor
    moves: Moves | None


def _choose(
    pool: PagePool, policy: Policy, layers: Tensor, batch: DecodeBatch, options: ObserveOptions | None, *,
    evicts: bool,
) -> _Choice:  # fmt: skip
    table = pool.table(layers, batch, _filled(pool, batch))
    if options is not None:
        keys_NKSD, _ = table.vectors or pool.vectors(layers, batch, table.position_BKS)
        query_NTHD = pool.read_queries(layers, batch, options.heads).flatten(0, 1)
        observe_page(policy, table, keys_NKSD, query_NTHD, options)
    opens_N = torch.ones_like(table.now_B, dtype=torch.bool)
    slot_NK, moves = choose_slots(policy, table, opens_N, evicts=evicts)
    state = None if options is None else table.state
    return _Choice(state, _blocks(batch, slot_NK.unflatten(0, (len(layers), -1))), moves)


def _observe(
    pool: PagePool, policy: Policy, layers: Tensor, batch: DecodeBatch, step: Step
) -> dict[str, Tensor]:
    """State of the policy after a step, whose queries are L x B x H x D."""
    table = pool.table(layers, batch, batch.count_B)
    query_NKGD = step.query_BKGD.flatten(0, 1).unflatten(1, (pool.heads, -1))
    policy.observe(table, step._replace(queries_BKGD=query_NKGD if reads_vectors(pool.needs) else None))
    return table.state


def _filled(pool: PagePool, batch: DecodeBatch) -> Tensor:
    """Page slots that hold tokens before the new one is written."""
    return torch.minimum(batch.now_B // pool.page_size, batch.cap_B)


def _blocks(batch: DecodeBatch, slot_LBK: Tensor) -> Tensor:
    return batch.block_BP[torch.arange(len(batch.now_B), device=slot_LBK.device)[:, None], slot_LBK]


class _Programs(NamedTuple):
    locate: Any = _locate
    choose: Any = _choose
    observe: Any = _observe


_EAGER = _Programs()
