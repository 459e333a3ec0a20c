"""The KV cache blocks that vLLM allocates, seen as pages: keys, values and the page's state in each layer.

A block id names a page in every layer. The state of a page (key bounds, positions, the policy's tensors) is stored
in the padding after its keys and values, so it belongs to a block, not to a request: it survives in the prefix
cache, and vLLM counts it when it sizes the pool. If the policy learns from attention weights, a request also owns
blocks for the queries of the page being written. Block 0 is vLLM's null block: what must not be stored is written
there.

Shape suffixes: L layers, X blocks, B rows, N rows of all layers (layer after layer), K KV heads (1 where one table
serves a whole layer), H query heads, G query heads of a KV head, P page slots of a row, E query blocks of a row,
R queries per head in a block, T tokens in a page, S = P x T, D head dim, M tokens moved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longthink import kernels
from longthink.errors import UnsupportedFeatureError
from longthink.kernels import At, Index
from longthink.kernels.compiled import mark_dynamic
from longthink.policies import Moves, PageTable, Policy, Shape, page_tables

_ALIGNMENT = 8


class _Field(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def _page_layout(
    policy: Policy, kv_heads: int, head_dim: int, dtype: torch.dtype, kv_bytes: int
) -> tuple[list[_Field], int]:
    """State tensors of a page whose keys and values take `kv_bytes`, and the size of the page in bytes."""
    tables = page_tables(policy, kv_heads)
    specs: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    if "key_bounds" in policy.needs:
        specs += [(name, dtype, (kv_heads, head_dim)) for name in ("kmin", "kmax")]
    specs.append(("position", torch.int32, (tables, policy.page_size)))
    state = policy.init_state(Shape(1, tables, 1, policy.page_size), torch.device("meta"))
    specs += [(f"state.{name}", tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in state.items()]
    fields, end = [], _align(kv_bytes)
    for name, kind, shape in specs:
        fields.append(_Field(name, kind, shape, end))
        end = _align(end + torch.Size(shape).numel() * kind.itemsize)
    return fields, end


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def page_bytes(policy: Policy, kv_heads: int, head_dim: int, dtype: torch.dtype, kv_bytes: int) -> int:
    """Bytes of a page including its state, where keys and values take `kv_bytes`."""
    return _page_layout(policy, kv_heads, head_dim, dtype, kv_bytes)[1]


def query_blocks(policy: Policy, heads: int, kv_heads: int) -> int:
    """Blocks that a request needs for the queries of one page; a block holds 2 x kv_heads vectors per token."""
    return -(-heads // (2 * kv_heads)) if "weights" in policy.needs else 0


class DecodeBatch(NamedTuple):
    """Requests that decode one token each, and their pages."""

    block_BP: Tensor  # block of each page slot, int64; 0 (the null block) for slots not in use
    now_B: Tensor  # position of the token being decoded
    prompt_B: Tensor
    cap_B: Tensor  # page slots that the request may fill
    count_B: Tensor  # page slots in use once the token is written
    query_BE: Tensor  # blocks for the queries of the page being written

    def take(self, index: Tensor) -> DecodeBatch:
        return DecodeBatch(*(tensor[index] for tensor in self))

    def mark_dynamic(self) -> DecodeBatch:
        return DecodeBatch(*(mark_dynamic(tensor, *range(tensor.ndim)) for tensor in self))


class PagePool:
    """Views of vLLM's KV caches (X x K x T x 2D) of some layers, evenly spaced in one allocation.

    `SlotStore` is the counterpart whose memory is longthink's own. `transposed` stores the keys of a block as D x T,
    the layout of vLLM's CPU kernel.
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
                    "longthink needs the KV caches of all layers evenly spaced in one allocation: "
                    f"layer {index} of {len(caches)} is not"
                )
        self.policy, self.page_size, self.heads, self.dim = policy, tokens, heads, dim
        self.tables, self.needs = page_tables(policy, heads), policy.needs
        self._first, self._start, self._apart = first, start, apart
        self._block = first.stride(0) * size
        self.layers, self._blocks = len(caches), blocks
        by_token = ((heads, tokens, dim), (first.stride(1), dim, 1))
        by_dim = ((heads, dim, tokens), (first.stride(1), tokens, 1))
        keys = self._view(first.dtype, 0, *(by_dim if transposed else by_token))
        self.keys_LXKTD = keys.transpose(-1, -2) if transposed else keys
        self.values_LXKTD = self._view(first.dtype, tokens * dim * size, *by_token)
        self._query_LXRD = self._view(first.dtype, 0, (2 * heads * tokens, dim))
        fields, _ = _page_layout(policy, heads, dim, first.dtype, heads * first.stride(1) * size)
        state = {field.name: self._view(field.dtype, field.offset, field.shape) for field in fields}
        self.kmin_LXKD, self.kmax_LXKD = state.pop("kmin", None), state.pop("kmax", None)
        self.position_LXKT = state.pop("position")
        self.state = {name.removeprefix("state."): tensor for name, tensor in state.items()}

    def _view(
        self, dtype: torch.dtype, offset: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None
    ) -> Tensor:
        """View of shape L x X x shape, `offset` bytes from the start of each page."""
        item, storage = dtype.itemsize, self._first.untyped_storage()
        flat = torch.empty(0, dtype=dtype, device=self._first.device)
        flat.set_(storage, 0, (storage.nbytes() // item,), (1,))
        if strides is None:
            strides = tuple(torch.Size(shape[at + 1 :]).numel() for at in range(len(shape)))
        strides = (self._apart // item, self._block // item, *strides)
        return flat.as_strided((self.layers, self._blocks, *shape), strides, (self._start + offset) // item)

    def table(self, layers: Tensor, batch: DecodeBatch, filled_B: Tensor) -> PageTable:
        """Gather the page tables of some layers as one table of N rows, of which `filled_B` slots hold tokens.

        A compiled step drops the parts that the policy does not read.
        """
        at = (layers[:, None, None], batch.block_BP[None])
        pages = batch.block_BP.shape[1]
        position_NKS = _by_table(self.position_LXKT, at)
        slot_S = torch.arange(pages * self.page_size, device=filled_B.device)
        held_B1S = (slot_S < filled_B[:, None] * self.page_size)[:, None]
        position_NKS = torch.where(held_B1S.repeat(len(layers), 1, 1), position_NKS, -1)
        vectors = key_bounds = None
        if "vectors" in self.needs:
            vectors = self.vectors(layers, batch, position_NKS)
        if self.kmin_LXKD is not None and self.kmax_LXKD is not None:
            kmin, kmax = (
                part[at].permute(0, 1, 3, 2, 4).flatten(0, 1) for part in (self.kmin_LXKD, self.kmax_LXKD)
            )
            key_bounds = (kmin, kmax)
        now_N, prompt_N, cap_N = (x.repeat(len(layers)) for x in (batch.now_B, batch.prompt_B, batch.cap_B))
        state = {name: _by_table(tensor, at) for name, tensor in self.state.items()}
        return PageTable(
            self.page_size, position_NKS, now_N, prompt_N, cap_N, pages, state, vectors, key_bounds
        )

    def vectors(self, layers: Tensor, batch: DecodeBatch, position_NKS: Tensor) -> tuple[Tensor, Tensor]:
        """Gather keys and values of some layers (NKSD), zero where there is no token."""
        at = (layers[:, None, None], batch.block_BP[None])
        nothing_NKS1 = (position_NKS < 0)[..., None]
        keys, values = (
            _by_table(part, at).masked_fill(nothing_NKS1, 0) for part in (self.keys_LXKTD, self.values_LXKTD)
        )
        return keys, values

    def store_state(
        self, layers: Tensor, batch: DecodeBatch, state: dict[str, Tensor], active_B: Tensor
    ) -> None:
        """Write the state of a gathered table back for the active rows."""
        # The state of inactive rows goes to the null block.
        block_BP = torch.where(active_B[:, None], batch.block_BP, 0)
        for name, tensor in self.state.items():
            each = tensor.shape[3]
            new = state[name].unflatten(0, (len(layers), -1)).unflatten(3, (-1, each))
            tensor[layers[:, None, None], block_BP[None]] = new.transpose(2, 3)

    def tail_slots(self, layers: Tensor, batch: DecodeBatch) -> Tensor:
        """Page slot being written in each table, L x B x K: the slot whose first token starts the current page."""
        first_LBPK = self.position_LXKT[..., 0][layers[:, None, None], batch.block_BP[None]]
        used_BP = torch.arange(batch.block_BP.shape[1], device=batch.now_B.device) < batch.count_B[:, None]
        start_B11 = (batch.now_B - batch.now_B % self.page_size)[:, None, None]
        return ((first_LBPK == start_B11) & used_BP[..., None]).to(torch.int8).argmax(2)

    def clear_pages(self, layers: Tensor, block_LBK: Tensor, now_B: Tensor) -> None:
        page, page_of_heads = (self._index(layers, block_LBK, tables) for tables in (self.tables, self.heads))
        contents = [At(tensor, page) for tensor in self.state.values()]
        contents += [At(tensor, page_of_heads) for tensor in (self.keys_LXKTD, self.values_LXKTD)]
        kernels.empty(At(self.position_LXKT, page), contents)
        self.write_positions(layers, block_LBK, now_B)

    def move_tokens(self, layers: Tensor, batch: DecodeBatch, moves: Moves) -> None:
        """Move tokens with their position and state; the slots they leave become empty."""
        shape = (len(layers), -1, *moves.source_BKM.shape[1:])
        source, target = (index.view(shape) for index in moves)
        row = torch.arange(len(batch.now_B), device=source.device)[:, None, None]

        def locate(index: Tensor, tables: int) -> Index:
            index = index.expand(-1, -1, tables, -1)
            table = torch.arange(tables, device=index.device)[:, None]
            block = batch.block_BP[row, index // self.page_size]
            return layers.view(-1, 1, 1, 1), block, table, index % self.page_size

        def moved(tensor: Tensor) -> tuple[Tensor, Index, Index]:
            return tensor, locate(source, tensor.shape[2]), locate(target, tensor.shape[2])

        per_token = [tensor for tensor in self.state.values() if tensor.shape[3] == self.page_size]
        contents = [moved(tensor) for tensor in (self.keys_LXKTD, self.values_LXKTD, *per_token)]
        kernels.move_tokens(moved(self.position_LXKT), contents)

    def write_positions(self, layers: Tensor, block_LBK: Tensor, now_B: Tensor) -> None:
        now_1B1 = now_B[None, :, None]
        index = (*self._index(layers, block_LBK, self.tables), now_1B1 % self.page_size)
        self.position_LXKT[index] = now_1B1.to(torch.int32)

    def append(
        self, layer: int, block_BK: Tensor, offset_B: Tensor, key_BKD: Tensor, value_BKD: Tensor
    ) -> None:
        head = torch.arange(self.heads, device=block_BK.device)
        at = (block_BK.expand(-1, self.heads), head, offset_B[:, None])
        kernels.append(At(self.keys_LXKTD[layer], at), At(self.values_LXKTD[layer], at), key_BKD, value_BKD)

    def widen_bounds(self, layers: Tensor, block_LBK: Tensor, now_B: Tensor, key_LBKD: Tensor) -> None:
        assert self.kmin_LXKD is not None and self.kmax_LXKD is not None
        page = self._index(layers, block_LBK, self.heads)
        first = (now_B % self.page_size == 0)[None, :, None, None]
        kernels.widen(At(self.kmin_LXKD, page), At(self.kmax_LXKD, page), key_LBKD, first)

    def _index(self, layers: Tensor, block_LBK: Tensor, tables: int) -> Index:
        """Index of one page per layer, row and table (or KV head)."""
        table = torch.arange(tables, device=block_LBK.device)
        return layers[:, None, None], block_LBK.expand(-1, -1, tables), table

    def write_queries(self, layers: Tensor, batch: DecodeBatch, query_LBHD: Tensor) -> None:
        within_B1 = (batch.now_B % self.page_size)[:, None]
        block_B1H, index_B1H = self._query_index(batch, within_B1, query_LBHD.shape[2])
        self._query_LXRD[layers[:, None, None], block_B1H[:, 0], index_B1H[:, 0]] = query_LBHD

    def read_queries(self, layers: Tensor, batch: DecodeBatch, heads: int) -> Tensor:
        """Queries of the page that is full, L x B x T x H x D."""
        within_BT = torch.arange(self.page_size, device=batch.now_B.device).expand(len(batch.now_B), -1)
        block_BTH, index_BTH = self._query_index(batch, within_BT, heads)
        return self._query_LXRD[layers[:, None, None, None], block_BTH, index_BTH]

    def _query_index(self, batch: DecodeBatch, within_BT: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Block and index within it of each query of a page; queries are ordered by token, then head."""
        rank_BTH = within_BT[..., None] * heads + torch.arange(heads, device=within_BT.device)
        room = self._query_LXRD.shape[2]
        block_BM = batch.query_BE.gather(1, rank_BTH.flatten(1) // room)
        return block_BM.view(rank_BTH.shape), rank_BTH % room

    def start_prompt_pages(self, block_B: Tensor, page_B: Tensor, filled_B: Tensor) -> None:
        """Set the positions of prompt pages that hold `filled_B` tokens, and reset their state, in all layers."""
        within = torch.arange(self.page_size, device=block_B.device)
        position_BT = page_B[:, None] * self.page_size + within
        position_BT = torch.where(within < filled_B[:, None], position_BT, -1).to(torch.int32)
        self.position_LXKT[:, block_B] = position_BT[None, :, None]
        for tensor in self.state.values():
            tensor[:, block_B] = 0

    def compute_prompt_bounds(self, layer: int, block_B: Tensor, filled_B: Tensor) -> None:
        if self.kmin_LXKD is None or self.kmax_LXKD is None:
            return
        keys_BKTD = self.keys_LXKTD[layer, block_B]
        within = torch.arange(self.page_size, device=block_B.device)
        empty = (within >= filled_B[:, None])[:, None, :, None]
        self.kmin_LXKD[layer, block_B] = keys_BKTD.masked_fill(empty, torch.inf).amin(2)
        self.kmax_LXKD[layer, block_B] = keys_BKTD.masked_fill(empty, -torch.inf).amax(2)


def _by_table(tensor: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    """Gather blocks of a tensor L x X x K x n x ... as N x K x (P n) x ..., without changing its memory order."""
    if tensor.stride(-1) != 1:  # keys stored as D x T
        pages_LBPKDT = tensor.transpose(-1, -2)[at]
        return pages_LBPKDT.permute(0, 1, 3, 4, 2, 5).flatten(4, 5).flatten(0, 1).transpose(2, 3)
    return tensor[at].transpose(2, 3).flatten(0, 1).flatten(2, 3)
