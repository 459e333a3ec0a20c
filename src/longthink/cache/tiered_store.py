"""Page slots of two kinds under one page table: in full, and behind them packed at few bits.

A page is written in full. When a row's window of recent pages is full, the oldest of them leaves it: its keys and
values are packed into a packed slot, and position, policy state and key bounds go there with it. So a policy sees one
table and need not know which slots are packed.

Shape suffixes: B batch rows, K KV heads (1 in tables that a whole layer shares), P page slots, F of them in full, N
packed (P = F + N), T tokens in a page, S = P * T token slots, D head dim, Q columns of a prompt block, R pages read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from longthink import kernels
from longthink.cache.step import evictable_pages
from longthink.cache.store import SlotStore
from longthink.config import KvBits
from longthink.kernels import entries, packing
from longthink.policies import Policy, RanksPages, SelectsPages, grows

_PACKED = packing.PackedPages._fields
_ORDER = "channel_order_BN"
_ALL = 1 << 24  # more pages than a prompt has


@dataclass(frozen=True)
class _Unpack:
    """Keys and values of all token slots, BKSD, those of packed pages as they are read."""

    keys_BKSD: Tensor
    values_BKSD: Tensor
    packed: packing.PackedPages
    page_size: int
    order_BKD: Tensor

    def __call__(self) -> tuple[Tensor, Tensor]:
        keys, values = packing.unpack(self.packed, self.page_size, self.keys_BKSD.dtype, self.order_BKD)
        return (
            torch.cat([self.keys_BKSD, keys.flatten(2, 3)], 2),
            torch.cat([self.values_BKSD, values.flatten(2, 3)], 2),
        )


class TieredStore(SlotStore):
    """Slots in full and packed slots of one layer.

    Parameters
    ----------
    policy, key_BKQD, cap_B, dtype
        As for `SlotStore`; `cap_B` counts slots of both kinds.
    full, packed
        Page slots of each kind to allocate, at least 1.
    kv_bits
        Bits of packed pages, and the window.
    order_BKD
        Order of the channels of packed keys, from `packing.order_channels`: for good, as packed pages depend on it.
    """

    def __init__(
        self,
        policy: Policy,
        key_BKQD: Tensor,
        cap_B: list[int],
        full: int,
        packed: int,
        kv_bits: KvBits,
        order_BKD: Tensor,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.packed = packing.empty_pages(key_BKQD, packed, policy.page_size, kv_bits.keys, kv_bits.values)
        self.kv_bits = kv_bits
        self.channel_order_BN = order_BKD.to(torch.int16).flatten(1)
        self.stays = pages_that_stay(policy, kv_bits)
        super().__init__(policy, key_BKQD, cap_B, full + packed, dtype, packed=packed)

    @override
    def _expose_needs(self) -> None:
        super()._expose_needs()
        if "vectors" in self.needs:
            page_size = self.table.page_size
            self.table.unpack = _Unpack(
                self.keys_BKSD, self.values_BKSD, self.packed, page_size, self.order_BKD
            )

    @property
    def full_pages(self) -> int:
        """Number of slots in full, which come first."""
        return self.keys_BKSD.shape[2] // self.table.page_size

    @property
    def packed_pages(self) -> int:
        """Number of packed slots."""
        return self.packed.key_codes_BKPN.shape[2]

    @property
    def order_BKD(self) -> Tensor:
        """Order of the channels of packed keys."""
        return self.channel_order_BN.long().unflatten(1, (self.keys_BKSD.shape[1], -1))

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, in full and packed, with all that it takes to read them."""
        held = self.keys_BKSD, self.values_BKSD, *self.packed, self.channel_order_BN
        return sum(tensor.nbytes for tensor in held)

    def _pack(self, keys_BKPTD: Tensor, values_BKPTD: Tensor) -> packing.PackedPages:
        return packing.pack(keys_BKPTD, values_BKPTD, self.kv_bits.keys, self.kv_bits.values, self.order_BKD)

    def _unpack(self, pages: packing.PackedPages) -> tuple[Tensor, Tensor]:
        return packing.unpack(pages, self.table.page_size, self.keys_BKSD.dtype, self.order_BKD)

    # The whole store ----------------------------------------------------------------------------------------

    @override
    def named_tensors(self) -> dict[str, Tensor]:
        return super().named_tensors() | self.packed._asdict() | {_ORDER: self.channel_order_BN}

    @override
    def _set_tensor(self, name: str, tensor: Tensor) -> None:
        if name in _PACKED:
            self.packed = self.packed._replace(**{name: tensor})
        else:
            super()._set_tensor(name, tensor)

    def resize(self, full: int, packed: int) -> None:
        """Give the store so many slots of each kind; those that go must be empty."""
        if (full, packed) == (old := (self.full_pages, self.packed_pages)):
            return
        new, pages = (full, packed), self.pages

        def resized(name: str, tensor: Tensor) -> Tensor:
            if tensor.ndim <= 2 or not tensor.shape[2]:
                return tensor
            if name in ("keys_BKSD", "values_BKSD"):
                return _fit(tensor, full * self.table.page_size)
            if name in _PACKED:
                return _fit(tensor, packed)
            unit, nothing = tensor.shape[2] // pages, -1 if name == "position_BKS" else 0
            parts = tensor.split([count * unit for count in old], 2)
            return torch.cat(
                [_fit(part, count * unit, nothing) for part, count in zip(parts, new, strict=True)], 2
            )

        self.apply_named(resized)

    def shrink(self, full: int, packed: int) -> None:
        """Free slots of each kind behind the first so many, as far as they are empty in all rows."""
        filled_P = (self.table.page_BKP >= 0).flatten(0, 1).any(0)
        used = [int((filled * torch.arange(1, len(filled) + 1, device=filled.device)).max())
                for filled in filled_P.split([self.full_pages, self.packed_pages])]  # fmt: skip
        full, packed = max(full, used[0]), max(packed, used[1])
        self.resize(min(full, self.full_pages), min(packed, self.packed_pages))

    @override
    def adopt(self, row: int, other: SlotStore, other_row: int = 0) -> None:
        assert isinstance(other, TieredStore)
        other = other.only(other_row)
        assert isinstance(other, TieredStore)
        full, packed = max(self.full_pages, other.full_pages), max(self.packed_pages, other.packed_pages)
        self.resize(full, packed)
        other.resize(full, packed)
        super().adopt(row, other)

    # Prefill ------------------------------------------------------------------------------------------------

    @override
    def _prompt_slots(self, slot_BKQ: Tensor, kept_BKQ: Tensor) -> Tensor:
        page_size, stays = self.table.page_size, self.stays
        page_BKQ = slot_BKQ.div(page_size, rounding_mode="floor")
        last_BK1 = torch.where(kept_BKQ, page_BKQ, -1).amax(-1, keepdim=True)
        first_BK1 = (last_BK1 + 1 - self.kv_bits.window // page_size).clamp(min=stays)
        # Pages that stay come first, then the window; in packed slots what lies between them.
        place_BKQ = torch.where(
            page_BKQ >= first_BK1, page_BKQ - first_BK1, self.full_pages + page_BKQ - 2 * stays
        )
        place_BKQ = torch.where(page_BKQ < stays, page_BKQ, place_BKQ + stays)
        return place_BKQ * page_size + slot_BKQ % page_size

    @override
    def _write(self, filled_BKS1: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor) -> None:
        tokens = self.keys_BKSD.shape[2]
        behind = [x[:, :, tokens:] for x in (filled_BKS1, keys_BKSD, values_BKSD)]
        super()._write(*(x[:, :, :tokens] for x in (filled_BKS1, keys_BKSD, values_BKSD)))
        filled, keys, values = (x.unflatten(2, (-1, self.table.page_size)) for x in behind)
        dtype = self.keys_BKSD.dtype
        packed = self._pack(keys.to(dtype), values.to(dtype))
        page = filled.any(3)[..., None]  # B x K x N x 1 x 1
        for old, new in zip(self.packed, packed, strict=True):
            old.copy_(torch.where(page.view(*page.shape[:3], *[1] * (old.ndim - 3)), new, old))
        if self.has_key_bounds:
            read, _ = self._unpack(self.packed)
            resident = self.table.resident_BKS[:, :, tokens:].unflatten(2, (-1, self.table.page_size))
            bounds = kernels.key_bounds(read, resident)
            for bound, found in zip((self.kmin_BKPD, self.kmax_BKPD), bounds, strict=True):
                bound[:, :, self.full_pages :] = found

    @override
    def truncate(self, lengths: list[int]) -> None:
        """Drop the tokens from these positions on; a page that goes on being written is unpacked.

        It takes the slot of the tail, all of whose tokens are dropped.
        """
        table, page_size = self.table, self.table.page_size
        length_B11 = torch.tensor(lengths, device=table.now_B.device)[:, None, None]
        goes_on_B11 = (length_B11 < table.now_B[:, None, None]) & (length_B11 % page_size > 0)
        found_BKN = (table.page_BKP[..., self.full_pages :] == length_B11 // page_size) & goes_on_B11
        where_BK = found_BKN.any(-1)
        packed_BK = found_BKN.int().argmax(-1)
        source_BK = packed_BK + self.full_pages
        at = [entries(packed_BK[..., None], tensor) for tensor in self.packed]
        page = packing.PackedPages(*(tensor[place] for tensor, place in zip(self.packed, at, strict=True)))
        for tensor, read in zip(
            (self.keys_BKSD, self.values_BKSD),
            self._unpack(page),
            strict=True,
        ):
            place = entries(self._tokens(self.tail_BK), tensor)
            tensor[place] = torch.where(where_BK[..., None, None], read[:, :, 0], tensor[place])
        self._carry(source_BK, self.tail_BK, where_BK)
        place = entries(self._tokens(source_BK), table.position_BKS)
        table.position_BKS[place] = torch.where(where_BK[..., None], -1, table.position_BKS[place])
        super().truncate(lengths)

    # Decode -------------------------------------------------------------------------------------------------

    def window_BKF(self) -> Tensor:
        """Slots in full whose pages leave for a packed one when the window is full, bool."""
        page_BKF, prompt_BKF = (
            x[..., : self.full_pages] for x in (self.table.page_BKP, self.table.prompt_BKP)
        )
        return (page_BKF >= 0) & ~(prompt_BKF & (page_BKF < self.stays))

    def pack(self, source_BK: Tensor, target_BK: Tensor, where_BK: Tensor) -> None:
        """Pack the page of a slot in full into a packed one, with all that belongs to it."""
        place_BK1 = (target_BK - self.full_pages)[..., None]
        tokens_BKT = self._tokens(source_BK)
        page = [x[entries(tokens_BKT, x)][:, :, None] for x in (self.keys_BKSD, self.values_BKSD)]
        packed = self._pack(*page)
        for tensor, new in zip(self.packed, packed, strict=True):
            at = entries(place_BK1, tensor)
            tensor[at] = torch.where(where_BK.view(*where_BK.shape, *[1] * (new.ndim - 2)), new, tensor[at])
        self._carry(source_BK, target_BK, where_BK)
        if self.has_key_bounds:
            read_BK1TD, _ = self._unpack(packed)
            resident_BK1T = (
                self.table.position_BKS[entries(tokens_BKT, self.table.position_BKS)][:, :, None] >= 0
            )
            found = kernels.key_bounds(read_BK1TD, resident_BK1T)
            for bound, new in zip((self.kmin_BKPD, self.kmax_BKPD), found, strict=True):
                at = entries(target_BK[..., None], bound)
                bound[at] = torch.where(where_BK[..., None, None], new, bound[at])

    def _carry(self, source_BK: Tensor, target_BK: Tensor, where_BK: Tensor) -> None:
        """Copy what the page table holds of a page to another slot."""
        source_BKT, target_BKT = self._tokens(source_BK), self._tokens(target_BK)
        for tensor in (self.table.position_BKS, self.user_BKP, *self.table.state.values()):
            per_page = self._is_per_page(tensor)
            source, target = (
                entries(page[..., None] if per_page else tokens, tensor)
                for page, tokens in ((source_BK, source_BKT), (target_BK, target_BKT))
            )
            mask = where_BK.view(*where_BK.shape, *[1] * (tensor.ndim - 2))
            tensor[target] = torch.where(mask, tensor[source], tensor[target])

    def _tokens(self, slot_BK: Tensor) -> Tensor:
        """Token slots of page slots, BKT."""
        within = torch.arange(self.table.page_size, device=slot_BK.device)
        return slot_BK[..., None] * self.table.page_size + within

    @override
    def read(self, slot_BKR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table, page_size, full = self.table, self.table.page_size, self.full_pages
        tokens_BKS = self._tokens(slot_BKR.clamp(min=0)).flatten(2)
        wanted = (slot_BKR >= 0).repeat_interleave(page_size, -1)
        resident = (table.position_BKS[entries(tokens_BKS, table.position_BKS)] >= 0) & wanted
        packed_BKR = (slot_BKR - full).clamp(min=0)
        pages = packing.PackedPages(*(tensor[entries(packed_BKR, tensor)] for tensor in self.packed))
        unpacked = self._unpack(pages)
        is_packed = (slot_BKR >= full).repeat_interleave(page_size, -1)[..., None]
        at = entries(tokens_BKS.clamp(max=self.keys_BKSD.shape[2] - 1), self.keys_BKSD)
        keys, values = (
            torch.where(is_packed, far.flatten(2, 3), near[at])
            for near, far in zip((self.keys_BKSD, self.values_BKSD), unpacked, strict=True)
        )
        return keys, values, resident


def pages_that_stay(policy: Policy, kv_bits: KvBits) -> int:
    """How many of the prompt's pages, from the first, are in full for good: none where the policy may evict them.

    The first one always is: most heads read its first tokens more than all others, and do not bear their rounding.
    """
    if not policy.pins_prompt() and not grows(policy):
        return 0
    return _ALL if kv_bits.prompt == "full" else 1


def open_tiered_pages(policy: Policy, store: TieredStore, *, evicts: bool) -> None:
    """Open a page in each row whose token at `now_B` starts one, and pack the page that leaves the window for it.

    Where no packed slot is left, the unprotected packed page with the least worth is evicted; `evicts` as in
    `cache.step.choose_slots`.
    """
    table, full = store.table, store.full_pages
    opens_B = table.now_B % table.page_size == 0
    page_BKF, window_BKF = table.page_BKP[..., :full], store.window_BKF()
    crowded_BK = window_BKF.sum(-1) >= store.kv_bits.window // table.page_size
    oldest_BK = kernels.lowest(page_BKF, page_BKF, window_BKF)
    slot_BK = torch.where(crowded_BK, oldest_BK, (page_BKF < 0).to(torch.int8).argmax(-1))
    packed_BK = _packed_slot(policy, store, evicts=evicts)
    store.pack(slot_BK, packed_BK, crowded_BK & opens_B[:, None])
    store.open_pages(slot_BK, opens_B)


def _packed_slot(policy: Policy, store: TieredStore, *, evicts: bool) -> Tensor:
    """Packed slot for the page that leaves the window, BK: an empty one, or that of the evicted page."""
    table, full = store.table, store.full_pages
    page_BKP = table.page_BKP
    empty_BKN = page_BKP[..., full:] < 0
    slot_BK = empty_BKN.to(torch.int8).argmax(-1) + full
    if not evicts:
        return slot_BK
    room_B = table.cap_B - store.kv_bits.window // table.page_size
    room_B = room_B - table.prompt_pages_B.clamp(max=store.stays)
    used_BK = (~empty_BKN).sum(-1)
    # After a rewind of prompt pages the caps follow with the next turn.
    is_full_BK = used_BK >= room_B[:, None].clamp(max=empty_BKN.shape[-1])
    worth_BKP, evictable_BKP = _ranking(policy, store)
    evicted_BK = kernels.lowest(worth_BKP, page_BKP, evictable_BKP)
    return torch.where(is_full_BK, evicted_BK, slot_BK)


def _ranking(policy: Policy, store: TieredStore) -> tuple[Tensor, Tensor]:
    """Worth of each page, and the packed ones that may be evicted, BKP."""
    table = store.table
    packed_BKP = torch.arange(store.pages, device=table.now_B.device) >= store.full_pages
    if isinstance(policy, RanksPages):
        free_BKP = ~table.prompt_BKP if policy.pins_prompt() else True
        return policy.page_worth(table), (table.page_BKP >= 0) & packed_BKP & free_BKP
    evictable_BKP = evictable_pages(policy, table) & packed_BKP
    # A policy may protect more recent pages than the window holds.
    none_BK1 = ~evictable_BKP.any(-1, keepdim=True)
    return policy.worth(table), torch.where(none_BK1, (table.page_BKP >= 0) & packed_BKP, evictable_BKP)


def read_tiers(
    policy: Policy, store: SlotStore, query_BKGD: Tensor, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """Attention over the pages that the policy selects, or over all resident ones, packed or not."""
    assert isinstance(store, TieredStore)
    table, with_weights = store.table, "weights" in store.needs
    selected_BKR = policy.select(table, query_BKGD) if isinstance(policy, SelectsPages) else None
    if selected_BKR is not None:
        keys, values, resident = store.read(selected_BKR)
        resident = resident.expand(-1, keys.shape[1], -1)
        return kernels.decode_attention(
            query_BKGD, keys, values, resident, scaling, with_weights=with_weights
        )
    full = store.keys_BKSD, store.values_BKSD
    resident_BKS = table.resident_BKS.expand(-1, query_BKGD.shape[1], -1)
    out, weights = kernels.tiered_attention(
        query_BKGD, full, store.packed, store.order_BKD, resident_BKS, table.page_size, scaling
    )
    return out, weights if with_weights else None


def _fit(tensor: Tensor, size: int, nothing: int = 0) -> Tensor:
    """A copy with so many entries in dimension 2."""
    if size <= tensor.shape[2]:
        # A view would keep the memory.
        return tensor[:, :, :size].clone()
    return pad(tensor, (*[0, 0] * (tensor.ndim - 3), 0, size - tensor.shape[2]), value=nothing)
