"""One decode step over the blocks of a pool: pages turn before the layers run, policies learn when they have run.

All layers share these two halves, so that a step costs few calls however many layers there are; between them a layer
writes its tokens and reads its pages. Who learns from attention weights does so when a page is full, before it turns
(`learning`). Nothing here reads a value of the device.

Shape suffixes: see `longthink.vllm.pool`; H query heads, G query heads of a KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longthink.cache.step import choose_slots
from longthink.kernels.compiled import compile_isolated, mark_dynamic
from longthink.policies import Milestone, Moves, Policy, RaaS, SavesTokens, Step, reads_vectors
from longthink.vllm.attend import Attend, New
from longthink.vllm.learning import Learning, learn_page
from longthink.vllm.pool import PagePool, Rows

ADMITS_IN_VAIN: frozenset[type[Policy]] = frozenset({Milestone, RaaS})
"""Policies, by exact class, that learn nothing from the prompt that matters while it is pinned."""


class Begun(NamedTuple):
    """A step that has begun.

    Attributes
    ----------
    work
        The functions that it takes.
    span
        The layers that it is for: all of them, or one.
    rows
        The requests that take part, one token each.
    active_B
        False for a token of a prompt that comes alone: it is read and written like others, and teaches nothing.
    block_LBK
        Block that each token goes to.
    plan
        What the attention needs to know.
    """

    work: _Work
    span: slice
    rows: Rows
    active_B: Tensor
    block_LBK: Tensor
    plan: Any


class DecodeStep:
    """The decode step of some layers.

    Parameters
    ----------
    policies
        The policy of each layer.
    attend
        How a layer writes and reads.
    scaling
        Factor on q.k.
    over_ranks
        See `longthink.policies.Step`.
    max_rows
        Most requests in a step.
    heads
        Query heads.
    compiles
        Make programs of what the layers share.
    keeps
        Put what the layers read at the same place in memory in each step, so that what they do can be recorded once
        and replayed, as a CUDA graph does.
    """

    def __init__(
        self,
        pool: PagePool,
        policies: list[Policy],
        attend: Attend,
        scaling: float,
        over_ranks: Callable[[Tensor], Tensor] | None,
        max_rows: int,
        heads: int,
        *,
        compiles: bool = False,
        keeps: bool = False,
    ) -> None:
        self.pool, self.attend = pool, attend
        self._policies, self._scaling, self._over_ranks = policies, scaling, over_ranks
        device, policy = pool.position_LXKT.device, pool.policy
        self._layers = torch.arange(pool.layers, device=device)
        self._moves = isinstance(policy, SavesTokens)
        self._learning = Learning(heads, scaling, over_ranks) if "weights" in policy.needs else None
        # All that a policy learns goes into its state.
        self._learns = bool(pool.state)
        self.admits = self._learns and type(policy) not in ADMITS_IN_VAIN
        """Whether `begin` must be told of rows whose prompt has just been read."""
        self._work = _Work(*map(compile_isolated, _EAGER)) if compiles else _EAGER
        self._kept = _Kept(max_rows) if keeps else None
        self._widens, dtype = pool.kmin_LXKD is not None, pool.keys_LXKTD.dtype
        shapes = ((max_rows if self._learns else 0, heads), (max_rows if self._widens else 0, pool.heads))
        self._query_LBHD, self._key_LBKD = (
            torch.zeros(pool.layers, *shape, pool.dim, dtype=dtype, device=device) for shape in shapes
        )

    def begin(
        self,
        rows: Rows,
        *,
        opening: Tensor | None,
        evicting: bool,
        starting: Tensor | None = None,
        layer: int | None = None,
    ) -> Begun:
        """Give each token a place, in all layers or in one.

        Parameters
        ----------
        starting
            Indices of the rows whose token is the first one behind the prompt, if the step `admits`.
        opening
            Indices of the rows whose token opens a page; None if there is none.
        evicting
            Whether one of them may have no empty slot.
        """
        span = slice(0, self.pool.layers) if layer is None else slice(layer, layer + 1)
        # Steps of one layer are rare: a program for them would not pay.
        work = self._work if layer is None else _EAGER
        if starting is not None:
            self._admit(span, rows.take(starting))
        if opening is not None:
            self._turn(work, span, rows.take(opening), evicting=evicting)
        layers = self._layers[span]
        block_LBK, plan = work.find(self.pool, self.attend, layers, rows.mark_dynamic())
        self.pool.write_positions(layers, block_LBK, rows.now_B)
        active_B = rows.now_B >= rows.prompt_B
        if self._kept is not None and layer is None:
            active_B, block_LBK = self._kept("own", active_B, block_LBK)
            rows, plan = Rows(*self._kept("rows", *rows)), type(plan)(*self._kept("plan", *plan))
        return Begun(work, span, rows, active_B, block_LBK, self.attend.ready(plan))

    def _admit(self, span: slice, rows: Rows) -> None:
        """Let the policy see the prompts of some rows."""
        pages_B = (rows.now_B + self.pool.page_size - 1) // self.pool.page_size
        for part in self._parts(span, apart=True):
            table = self.pool.table(self._layers[part], rows, pages_B)
            self._policies[part.start].admit(table, None)
            self.pool.store_state(
                self._layers[part], rows, table.state, torch.ones_like(rows.now_B, dtype=torch.bool)
            )

    def _turn(self, work: _Work, span: slice, rows: Rows, *, evicting: bool) -> None:
        pool, learning = self.pool, self._learning
        if not evicting and learning is None:
            # Slots fill in order while there are empty ones.
            slot_LBK = _filled(pool, rows)[None, :, None].expand(span.stop - span.start, -1, pool.tables)
            pool.open(self._layers[span], _blocks(rows, slot_LBK), rows.now_B)
            return
        # All vectors of all layers in one go would be too much.
        for part in self._parts(span, apart=self._moves or learning is not None):
            layers, policy = self._layers[part], self._policies[part.start]
            turned = work.turn(pool, policy, layers, rows.mark_dynamic(), learning, evicting=evicting)
            if turned.state is not None:
                pool.store_state(layers, rows, turned.state, rows.now_B > rows.prompt_B)
            if turned.moves is not None:
                pool.move(layers, rows, turned.moves)
            pool.open(layers, turned.block_LBK, rows.now_B)

    def _parts(self, span: slice, *, apart: bool) -> list[slice]:
        """Layers that can be worked on in one go: those of one rule."""
        if not apart and all(policy == self._policies[0] for policy in self._policies):
            return [span]
        return [slice(i, i + 1) for i in range(span.start, span.stop)]

    def layer(self, begun: Begun, layer: int, new: New, out_BHD: Tensor) -> None:
        """Write the tokens of a layer and read its pages."""
        self.attend.decode(layer, layer - begun.span.start, begun.plan, new, out_BHD)
        count = len(out_BHD)
        if self._learns:
            self._query_LBHD[layer, :count].copy_(new[0])
        if self._widens:
            self._key_LBKD[layer, :count].copy_(new[1])

    def finish(self, begun: Begun) -> None:
        """Learn from the layers of the step when all have run, or keep what is to be learned from."""
        rows, span = begun.rows, begun.span
        layers, count = self._layers[span], len(rows.now_B)
        if self._widens:
            self.pool.widen(layers, begun.block_LBK, rows.now_B, self._key_LBKD[span, :count])
        if self._learning is not None:
            self.pool.keep_queries(layers, rows, self._query_LBHD[span, :count])
        elif self._learns:
            for part in self._parts(span, apart=False):
                self._observe(begun, part, self._query_LBHD[part, :count])

    def _observe(self, begun: Begun, span: slice, query_LBHD: Tensor) -> None:
        layers, rows = self._layers[span], begun.rows
        step = Step(mark_dynamic(query_LBHD, 1), None, self._scaling, self._over_ranks)
        state = begun.work.learn(self.pool, self._policies[span.start], layers, rows, step)
        self.pool.store_state(layers, rows, state, begun.active_B)


class _Kept:
    """Tensors that lie at the same place in memory in every step of as many rows.

    Parameters
    ----------
    max_rows
        Most rows that a tensor may have.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._places: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, *tensors: Tensor) -> list[Tensor]:
        """Copy tensors to their places; rows are dimension 1 behind layers, else 0."""
        kept = []
        for index, tensor in enumerate(tensors):
            dim = int(tensor.ndim > 2)
            if (name, index) not in self._places:
                shape = [*tensor.shape[:dim], self._max_rows, *tensor.shape[dim + 1 :]]
                self._places[name, index] = tensor.new_zeros(shape)
            place = self._places[name, index].narrow(dim, 0, tensor.shape[dim])
            kept.append(place.copy_(tensor))
        return kept


# Functions of tensors, which a compiler makes programs of: nothing of the pool is written to.


def _find(pool: PagePool, attend: Attend, layers: Tensor, rows: Rows) -> tuple[Tensor, Any]:
    """Block that each token goes to, L x B x K, and what the attention needs to know."""
    tail_LBK = pool.tail(layers, rows)
    block_LBK = _blocks(rows, tail_LBK)
    return block_LBK, attend.plan(rows, tail_LBK, block_LBK)


class _Turned(NamedTuple):
    """The policy's state if it has learned, the block that each token opens (L x B x K), what leaves it before."""

    state: dict[str, Tensor] | None
    block_LBK: Tensor
    moves: Moves | None


def _turn(
    pool: PagePool, policy: Policy, layers: Tensor, rows: Rows, learning: Learning | None, *, evicting: bool
) -> _Turned:
    table = pool.table(layers, rows, _filled(pool, rows))
    if learning is not None:
        keys_NKSD, _ = table.vectors or pool.vectors(layers, rows, table.position_BKS)
        query_NTHD = pool.queries(layers, rows, learning.heads).flatten(0, 1)
        learn_page(policy, table, keys_NKSD, query_NTHD, learning)
    opens_N = torch.ones_like(table.now_B, dtype=torch.bool)
    slot_NK, moves = choose_slots(policy, table, opens_N, evicts=evicting)
    state = None if learning is None else table.state
    return _Turned(state, _blocks(rows, slot_NK.unflatten(0, (len(layers), -1))), moves)


def _learn(pool: PagePool, policy: Policy, layers: Tensor, rows: Rows, step: Step) -> dict[str, Tensor]:
    """State of the policy after a step; its queries are those of all layers, L x B x H x D."""
    table = pool.table(layers, rows, rows.count_B)
    query_NKGD = step.query_BKGD.flatten(0, 1).unflatten(1, (pool.heads, -1))
    policy.observe(table, step._replace(queries_BKGD=query_NKGD if reads_vectors(pool.needs) else None))
    return table.state


def _filled(pool: PagePool, rows: Rows) -> Tensor:
    """Page slots that hold something before the token comes."""
    return torch.minimum(rows.now_B // pool.page_size, rows.cap_B)


def _blocks(rows: Rows, slot_LBK: Tensor) -> Tensor:
    """Block that each slot stands for."""
    return rows.block_BP[torch.arange(len(rows.now_B), device=slot_LBK.device)[:, None], slot_LBK]


class _Work(NamedTuple):
    find: Any = _find
    turn: Any = _turn
    learn: Any = _learn


_EAGER = _Work()
