"""The blocks of all layers with what is known of them: keys and values, and in the padding behind them their state.

A block is a page of every layer, and in each layer memory of its own. What longthink has to remember of a page stands
behind its keys and values: the representatives, the logical position of each token, and the policy's own tensors. So
state belongs to a block, not to a request: it is there again when a prompt's blocks are found in the prefix cache,
and is part of the size that vLLM plans with.

A request also has blocks that hold no page: queries of the page that it is writing, for policies that learn from
attention weights. Those are taken when the page is full, of all its tokens in one matrix product.

Shape suffixes: L layers, X blocks, B rows, N rows of all layers (layer after layer), K KV heads (1 where a table
serves a layer), H query heads, P pages of a row, E its blocks of queries, R queries of a head in a block, T tokens in
a page, S = P x T, D head dim, M tokens moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longthink import kernels
from longthink.errors import UnsupportedFeatureError
from longthink.kernels import At, Index
from longthink.kernels.compiled import mark_dynamic
from longthink.policies import Moves, PageTable, Policy, Shape, page_tables

_ALIGNED = 8
"""Bytes that every piece of state, and every block, begins at a multiple of."""


@dataclass(frozen=True)
class _Piece:
    """Where one tensor of a page's state stands, and its shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def _pieces(policy: Policy, kv_heads: int, head_dim: int, dtype: torch.dtype, start: int) -> list[_Piece]:
    """State of a page, from byte `start` on; the last piece has no bytes and says where it ends."""
    tables = page_tables(policy, kv_heads)
    wanted: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    if "key_bounds" in policy.needs:
        wanted += [(name, dtype, (kv_heads, head_dim)) for name in ("kmin", "kmax")]
    wanted.append(("position", torch.int32, (tables, policy.page_size)))
    state = policy.init_state(Shape(1, tables, 1, policy.page_size), torch.device("meta"))
    wanted += [(f"state.{name}", tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in state.items()]
    wanted.append(("end", torch.int8, (0,)))
    pieces, offset = [], start
    for name, kind, shape in wanted:
        offset = -(-offset // _ALIGNED) * _ALIGNED
        pieces.append(_Piece(name, kind, shape, offset))
        offset += torch.Size(shape).numel() * kind.itemsize
    return pieces


def page_bytes(policy: Policy, kv_heads: int, head_dim: int, dtype: torch.dtype, kv_bytes: int) -> int:
    """Bytes of a page with its state, where keys and values take `kv_bytes`."""
    return _pieces(policy, kv_heads, head_dim, dtype, kv_bytes)[-1].offset


def query_blocks(policy: Policy, heads: int, kv_heads: int) -> int:
    """Blocks that a request needs for the queries of a page: they are as many numbers as `heads` keys or values."""
    return -(-heads // (2 * kv_heads)) if "weights" in policy.needs else 0


class Rows(NamedTuple):
    """Requests that take part in a step, with what their block tables mean.

    Attributes
    ----------
    block_BP
        Block of each page slot, int64; 0, which is nobody's, behind the last slot in use.
    now_B
        Position of the token to come.
    prompt_B, cap_B
        Tokens of the prompt, and page slots that may be filled.
    count_B
        Page slots in use when the token has been written.
    query_BE
        Blocks for the queries of a page.
    """

    block_BP: Tensor
    now_B: Tensor
    prompt_B: Tensor
    cap_B: Tensor
    count_B: Tensor
    query_BE: Tensor

    def take(self, index: Tensor) -> Rows:
        """Some of the rows."""
        return Rows(*(tensor[index] for tensor in self))

    def mark_dynamic(self) -> Rows:
        """The same, where a compiler knows that they and their pages change in number."""
        return Rows(*(mark_dynamic(tensor, *range(tensor.ndim)) for tensor in self))


class PagePool:
    """Views of vLLM's KV cache of some layers.

    Parameters
    ----------
    caches
        What vLLM gives each layer: X x K x T x 2D, keys and values of a token side by side, as it thinks.
    transposed
        Keys of a block stand as D x T, as vLLM's kernel for CPUs wants them, not as T x D.

    Raises
    ------
    UnsupportedFeatureError
        If the layers are not evenly spaced in one piece of memory.
    """

    def __init__(self, policy: Policy, caches: list[Tensor], *, transposed: bool) -> None:
        first = caches[0]
        blocks, heads, tokens, double = first.shape
        dim, size = double // 2, first.element_size()
        start = first.data_ptr() - first.untyped_storage().data_ptr()
        apart = caches[1].data_ptr() - first.data_ptr() if len(caches) > 1 else 0
        for index, cache in enumerate(caches):
            even = cache.data_ptr() - first.data_ptr() == index * apart and cache.shape == first.shape
            shares = cache.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            if not (even and shares and cache.stride() == first.stride()):
                raise UnsupportedFeatureError(
                    "the layers' KV caches are not evenly spaced in one piece of memory"
                )
        self.policy, self.page_size, self.heads, self.dim = policy, tokens, heads, dim
        self.tables, self.needs = page_tables(policy, heads), policy.needs
        self._first, self._start, self._apart = first, start, apart
        self._block = first.stride(0) * size
        self._size = (len(caches), blocks)
        self.transposed = transposed
        inner = (heads, dim, tokens) if transposed else (heads, tokens, dim)
        strides = (first.stride(1), tokens if transposed else dim, 1)
        keys, values = (
            self._view(first.dtype, shape, (half * tokens * dim) * size, part)
            for half, shape, part in (
                (0, inner, strides),
                (1, (heads, tokens, dim), (first.stride(1), dim, 1)),
            )
        )
        self.keys_LXKTD = keys.transpose(-1, -2) if transposed else keys
        self.values_LXKTD = values
        self._query_LXRD = self._view(first.dtype, (2 * heads * tokens, dim), 0)
        state = {}
        for piece in _pieces(policy, heads, dim, first.dtype, heads * first.stride(1) * size):
            if piece.name != "end":
                state[piece.name] = self._view(piece.dtype, piece.shape, piece.offset)
        self.kmin_LXKD, self.kmax_LXKD = state.pop("kmin", None), state.pop("kmax", None)
        self.position_LXKT = state.pop("position")
        self.state = {name.removeprefix("state."): tensor for name, tensor in state.items()}

    @property
    def layers(self) -> int:
        """Layers that the pool serves."""
        return self._size[0]

    def _view(
        self, dtype: torch.dtype, shape: tuple[int, ...], offset: int, strides: tuple[int, ...] | None = None
    ) -> Tensor:
        """Tensor L x X x shape of what stands `offset` bytes behind the begin of each page."""
        item, storage = dtype.itemsize, self._first.untyped_storage()
        flat = torch.empty(0, dtype=dtype, device=self._first.device)
        flat.set_(storage, 0, (storage.nbytes() // item,), (1,))
        if strides is None:
            strides = tuple(torch.Size(shape[at + 1 :]).numel() for at in range(len(shape)))
        outer = (self._apart // item, self._block // item)
        return flat.as_strided((*self._size, *shape), (*outer, *strides), (self._start + offset) // item)

    # Whole tables ------------------------------------------------------------------------------------------------

    def table(self, layers: Tensor, rows: Rows, filled_B: Tensor) -> PageTable:
        """What the policy may see of some layers, gathered: N rows.

        What it does not look at costs nothing in a compiled step, where the compiler leaves it out.

        Parameters
        ----------
        filled_B
            Page slots that hold something.
        """
        at = (layers[:, None, None], rows.block_BP[None])
        pages = rows.block_BP.shape[1]
        position_NKS = _by_table(self.position_LXKT, at)
        slot_S = torch.arange(pages * self.page_size, device=filled_B.device)
        held_B1S = (slot_S < filled_B[:, None] * self.page_size)[:, None]
        position_NKS = torch.where(held_B1S.repeat(len(layers), 1, 1), position_NKS, -1)
        vectors = key_bounds = None
        if "vectors" in self.needs:
            vectors = self.vectors(layers, rows, position_NKS)
        if self.kmin_LXKD is not None and self.kmax_LXKD is not None:
            kmin, kmax = (
                part[at].permute(0, 1, 3, 2, 4).flatten(0, 1) for part in (self.kmin_LXKD, self.kmax_LXKD)
            )
            key_bounds = (kmin, kmax)
        now_N, prompt_N, cap_N = (x.repeat(len(layers)) for x in (rows.now_B, rows.prompt_B, rows.cap_B))
        state = {name: _by_table(tensor, at) for name, tensor in self.state.items()}
        return PageTable(
            self.page_size, position_NKS, now_N, prompt_N, cap_N, pages, state, vectors, key_bounds
        )

    def vectors(self, layers: Tensor, rows: Rows, position_NKS: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some layers, gathered (NKSD): zeros where no token is, as in slots."""
        at = (layers[:, None, None], rows.block_BP[None])
        nothing_NKS1 = (position_NKS < 0)[..., None]
        keys, values = (
            _by_table(part, at).masked_fill(nothing_NKS1, 0) for part in (self.keys_LXKTD, self.values_LXKTD)
        )
        return keys, values

    def store_state(self, layers: Tensor, rows: Rows, state: dict[str, Tensor], active_B: Tensor) -> None:
        """Take over the state of a table where rows are active."""
        # Nobody's block takes what must not be stored.
        block_BP = torch.where(active_B[:, None], rows.block_BP, 0)
        for name, tensor in self.state.items():
            each = tensor.shape[3]
            new = state[name].unflatten(0, (len(layers), -1)).unflatten(3, (-1, each))
            tensor[layers[:, None, None], block_BP[None]] = new.transpose(2, 3)

    # Pages -------------------------------------------------------------------------------------------------------

    def tail(self, layers: Tensor, rows: Rows) -> Tensor:
        """Page slot that each table writes its token to, L x B x K: the one whose first token is the page's first."""
        first_LBPK = self.position_LXKT[..., 0][layers[:, None, None], rows.block_BP[None]]
        used_BP1 = (torch.arange(rows.block_BP.shape[1], device=rows.now_B.device) < rows.count_B[:, None])[
            ..., None
        ]
        begin_B11 = (rows.now_B - rows.now_B % self.page_size)[:, None, None]
        return ((first_LBPK == begin_B11) & used_BP1).to(torch.int8).argmax(2)

    def open(self, layers: Tensor, block_LBK: Tensor, now_B: Tensor) -> None:
        """Empty pages for the tokens at `now_B`, the first ones of their pages."""
        page, page_of_heads = (
            self._pages(layers, block_LBK, self.tables),
            self._pages(layers, block_LBK, self.heads),
        )
        contents = [At(tensor, page) for tensor in self.state.values()]
        contents += [At(tensor, page_of_heads) for tensor in (self.keys_LXKTD, self.values_LXKTD)]
        kernels.empty(At(self.position_LXKT, page), contents)
        self.write_positions(layers, block_LBK, now_B)

    def move(self, layers: Tensor, rows: Rows, moves: Moves) -> None:
        """Carry tokens to other slots, with position and state; the slots they leave are empty."""
        shape = (len(layers), -1, *moves.source_BKM.shape[1:])
        source, target = (index.view(shape) for index in moves)
        row = torch.arange(len(rows.now_B), device=source.device)[:, None, None]

        def place(index: Tensor, tables: int) -> Index:
            index = index.expand(-1, -1, tables, -1)
            table = torch.arange(tables, device=index.device)[:, None]
            block = rows.block_BP[row, index // self.page_size]
            return layers.view(-1, 1, 1, 1), block, table, index % self.page_size

        def carried(tensor: Tensor) -> tuple[Tensor, Index, Index]:
            return tensor, place(source, tensor.shape[2]), place(target, tensor.shape[2])

        per_token = [tensor for tensor in self.state.values() if tensor.shape[3] == self.page_size]
        contents = [carried(tensor) for tensor in (self.keys_LXKTD, self.values_LXKTD, *per_token)]
        kernels.move_tokens(carried(self.position_LXKT), contents)

    def write_positions(self, layers: Tensor, block_LBK: Tensor, now_B: Tensor) -> None:
        """Note where the tokens at `now_B` stand."""
        page = self._pages(layers, block_LBK, self.tables)
        self.position_LXKT[(*page, (now_B % self.page_size)[None, :, None])] = now_B.to(torch.int32)[
            None, :, None
        ]

    def append(
        self, layer: int, block_BK: Tensor, offset_B: Tensor, key_BKD: Tensor, value_BKD: Tensor
    ) -> None:
        """Write the keys and values of a layer's new tokens."""
        head = torch.arange(self.heads, device=block_BK.device)
        at = (block_BK.expand(-1, self.heads), head, offset_B[:, None])
        kernels.append(At(self.keys_LXKTD[layer], at), At(self.values_LXKTD[layer], at), key_BKD, value_BKD)

    def widen(self, layers: Tensor, block_LBK: Tensor, now_B: Tensor, key_LBKD: Tensor) -> None:
        """Widen the key bounds of the pages of new tokens."""
        assert self.kmin_LXKD is not None and self.kmax_LXKD is not None
        page = self._pages(layers, block_LBK, self.heads)
        first = (now_B % self.page_size == 0)[None, :, None, None]
        kernels.widen(At(self.kmin_LXKD, page), At(self.kmax_LXKD, page), key_LBKD, first)

    def _pages(self, layers: Tensor, block_LBK: Tensor, tables: int) -> Index:
        """Index of a page of each layer, row and table or KV head."""
        table = torch.arange(tables, device=block_LBK.device)
        return layers[:, None, None], block_LBK.expand(-1, -1, tables), table

    # Queries -----------------------------------------------------------------------------------------------------

    def keep_queries(self, layers: Tensor, rows: Rows, query_LBHD: Tensor) -> None:
        """Keep those of the tokens at `now_B`."""
        within_B1 = (rows.now_B % self.page_size)[:, None]
        block_B1H, place_B1H = self._query_places(rows, within_B1, query_LBHD.shape[2])
        self._query_LXRD[layers[:, None, None], block_B1H[:, 0], place_B1H[:, 0]] = query_LBHD

    def queries(self, layers: Tensor, rows: Rows, heads: int) -> Tensor:
        """Those of a page's tokens, L x B x T x H x D."""
        within_BT = torch.arange(self.page_size, device=rows.now_B.device).expand(len(rows.now_B), -1)
        block_BTH, place_BTH = self._query_places(rows, within_BT, heads)
        return self._query_LXRD[layers[:, None, None, None], block_BTH, place_BTH]

    def _query_places(self, rows: Rows, within_BT: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Block, and place in it, of each head's query for tokens of a page: head after head, token after token."""
        at_BTH = within_BT[..., None] * heads + torch.arange(heads, device=within_BT.device)
        room = self._query_LXRD.shape[2]
        block_BM = rows.query_BE.gather(1, at_BTH.flatten(1) // room)
        return block_BM.view(at_BTH.shape), at_BTH % room

    # The prompt --------------------------------------------------------------------------------------------------

    def begin_prompt(self, block_B: Tensor, page_B: Tensor, filled_B: Tensor) -> None:
        """Note the positions of pages of prompts, filled up to some token, in all layers; their state starts anew."""
        within = torch.arange(self.page_size, device=block_B.device)
        position_BT = page_B[:, None] * self.page_size + within
        position_BT = torch.where(within < filled_B[:, None], position_BT, -1).to(torch.int32)
        self.position_LXKT[:, block_B] = position_BT[None, :, None]
        for tensor in self.state.values():
            tensor[:, block_B] = 0

    def represent_prompt(self, layer: int, block_B: Tensor, filled_B: Tensor) -> None:
        """Take the representatives of pages of prompts from their keys."""
        if self.kmin_LXKD is None or self.kmax_LXKD is None:
            return
        keys_BKTD = self.keys_LXKTD[layer, block_B]
        within = torch.arange(self.page_size, device=block_B.device)
        empty = (within >= filled_B[:, None])[:, None, :, None]
        self.kmin_LXKD[layer, block_B] = keys_BKTD.masked_fill(empty, torch.inf).amin(2)
        self.kmax_LXKD[layer, block_B] = keys_BKTD.masked_fill(empty, -torch.inf).amax(2)


def _by_table(tensor: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    """L x X x K x n x ... at some blocks as N x K x (P n) x ...: a policy's tensor, in the order it has in memory."""
    if tensor.stride(-1) != 1:  # keys that stand as D x T
        pages_LBPKDT = tensor.transpose(-1, -2)[at]
        return pages_LBPKDT.permute(0, 1, 3, 4, 2, 5).flatten(4, 5).flatten(0, 1).transpose(2, 3)
    return tensor[at].transpose(2, 3).flatten(0, 1).flatten(2, 3)
