"""A later turn: what the user writes behind a text that has been decoded, read as one block.

Attention is computed for many tokens at once; then they are appended one by one and the policy observes each, so the
cache ends up as if they had been decoded. Nothing is evicted meanwhile: every row must have slots for all of them.

Shape suffixes: B batch rows, H query heads, K KV heads (1 in tables that a whole layer shares), G query heads per KV
head, Q columns of the block, J its tokens with padding taken out, M of these handled together, S token slots,
N = S + J keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longthink import kernels
from longthink.cache.step import QKV, open_pages, shift_keys
from longthink.cache.store import SlotStore
from longthink.kernels.reference import weighted_attention
from longthink.policies import Policy, ShiftsKeys, Step, reads_vectors

_AT_ONCE = 64
"""Tokens whose attention is computed together: memory for masks and weights stays linear in the text."""


def read_turn(
    policy: Policy, store: SlotStore, block: QKV, real_BQ: Tensor | None, lengths: list[int], scaling: float
) -> Tensor:
    """Take in a block of tokens behind the text.

    Parameters
    ----------
    block
        Queries (BHQD), keys and values (BKQD).
    real_BQ
        False for padding, which takes no slot; None if there is none.
    lengths
        Tokens that each row has seen before.

    Returns
    -------
    Tensor
        Attention output, shape BHQD. What stands at padding has no meaning.
    """
    rows, _, columns, _ = block[0].shape
    if real_BQ is None:
        real_BQ = torch.ones(rows, columns, dtype=torch.bool, device=block[0].device)
    counts = real_BQ.sum(1).tolist()
    order_BJ = (~real_BQ).to(torch.int8).argsort(dim=1, stable=True)[:, : max(counts)]
    query, key, value = (tensor.gather(2, _along(order_BJ, tensor)) for tensor in block)
    # One by one, each key and value would be read in the format that the cache keeps.
    kept = key.to(store.keys_BKSD.dtype), value.to(store.values_BKSD.dtype)
    reader = _Reader(policy, store, kept, real_BQ.gather(1, order_BJ), scaling, query.dtype)
    saved: dict[int, list[Tensor]] = {}
    out_BHQD = block[0].new_zeros(*block[0].shape[:3], value.shape[3])
    for start in range(0, max(counts), _AT_ONCE):
        query_BHMD = query[:, :, start : start + _AT_ONCE]
        out_BHMD, weights_BKGMN = reader.attend(query_BHMD, start)
        out_BHQD.scatter_(2, _along(order_BJ[:, start : start + _AT_ONCE], out_BHMD), out_BHMD)
        for j in range(start, start + query_BHMD.shape[2]):
            # A row that has no more tokens goes through the motions, and is put back at the end.
            for row in (row for row, count in enumerate(counts) if count == j):
                saved[row] = [tensor[row].clone() for tensor in store.tensors()]
            opens = any((length + j) % policy.page_size == 0 for length in lengths)
            weights_BKGN = None if weights_BKGMN is None else weights_BKGMN[..., j - start, :]
            reader.append(query_BHMD[:, :, j - start], j, weights_BKGN, opens=opens)
    for row, tensors in saved.items():
        for tensor, old in zip(store.tensors(), tensors, strict=True):
            tensor[row] = old
    return out_BHQD


class _Reader:
    """The two halves of reading a block: attention of some of its tokens, and one token into the slots."""

    def __init__(
        self, policy: Policy, store: SlotStore, kept: tuple[Tensor, Tensor], real_BJ: Tensor, scaling: float,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        if isinstance(policy, ShiftsKeys):
            # Before the first decode step the first keys still stand where they were written.
            shift_keys(policy, store)
        self._policy, self._store, self._scaling = policy, store, scaling
        self._new_BKJD = kept
        resident_BKS = store.table.resident_BKS
        self._slots = resident_BKS.shape[2]
        self._keys_BKND = torch.cat([store.keys_BKSD, kept[0]], 2).to(dtype)
        self._values_BKND = torch.cat([store.values_BKSD, kept[1]], 2).to(dtype)
        real_BKJ = real_BJ[:, None].expand(-1, resident_BKS.shape[1], -1)
        self._readable_BKN = torch.cat([resident_BKS, real_BKJ], 2)
        # Where in the slots each token went.
        self._slot_BKJ = real_BKJ.new_zeros(real_BKJ.shape, dtype=torch.int64)

    def attend(self, query_BHMD: Tensor, start: int) -> tuple[Tensor, Tensor | None]:
        """Output of the tokens from `start` on, and their weights (BKGMN) if the policy learns from them."""
        many = query_BHMD.shape[2]
        key_N = torch.arange(self._readable_BKN.shape[2], device=query_BHMD.device)
        query_M = self._slots + start + torch.arange(many, device=query_BHMD.device)
        mask_BKMN = self._readable_BKN[:, :, None] & (key_N <= query_M[:, None])
        keys, values = self._keys_BKND, self._values_BKND
        if "weights" not in self._store.needs:
            rule = self._store.rule
            return kernels.block_attention(query_BHMD, keys, values, mask_BKMN, self._scaling, rule), None
        query_BKGMD = query_BHMD.unflatten(1, (keys.shape[1], -1))
        out_BKGMD, weights_BKGMN = weighted_attention(
            query_BKGMD, keys[:, :, None], values[:, :, None], mask_BKMN[:, :, None], self._scaling,
            self._store.rule,
        )  # fmt: skip
        return out_BKGMD.flatten(1, 2), weights_BKGMN

    def append(self, query_BHD: Tensor, j: int, weights_BKGN: Tensor | None, *, opens: bool) -> None:
        """Put token `j` of every row into its slot, and let the policy observe it."""
        policy, store = self._policy, self._store
        key_BKJD, value_BKJD = self._new_BKJD
        if opens:
            open_pages(policy, store, evicts=False)
        table = store.table
        self._slot_BKJ[:, :, j] = store.tail_BK * table.page_size + (table.now_B % table.page_size)[:, None]
        store.append(key_BKJD[:, :, j], value_BKJD[:, :, j])
        if isinstance(policy, ShiftsKeys):
            # It may be one of the first tokens.
            shift_keys(policy, store)
        weights_BKGS = None
        if weights_BKGN is not None:
            weights_BKGS = weights_BKGN[..., : self._slots].clone()
            new = weights_BKGN[..., self._slots : self._slots + j + 1]
            weights_BKGS.scatter_(-1, self._slot_BKJ[:, :, None, : j + 1].expand_as(new), new)
        query_BKGD = query_BHD.unflatten(1, (key_BKJD.shape[1], -1)) if reads_vectors(store.needs) else None
        policy.observe(table, Step(query_BKGD, weights_BKGS, self._scaling))
        table.now_B.add_(1)


def _along(index_BJ: Tensor, like: Tensor) -> Tensor:
    """The index of dimension 2, for all heads and features."""
    return index_BJ[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])
