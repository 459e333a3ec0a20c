"""The decode step of one layer, as pure tensor code of fixed shapes.

Nothing here depends on a Python number that changes between steps or synchronises with the device, so the step
compiles into one program; `LayerCache` counts tokens on the host. The same functions run eagerly.

Shape suffixes: B batch rows, H query heads, K KV heads, G query heads per KV head, P page slots, S token slots,
D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from longthink import kernels
from longthink.cache.store import SlotStore
from longthink.policies import (
    Moves,
    PageTable,
    Policy,
    SavesTokens,
    SelectsPages,
    ShiftsKeys,
    Step,
    grows,
    reads_vectors,
)

QKV = tuple[Tensor, Tensor, Tensor]
"""Query (BHD), key and value (BKD) of one token per row."""
Read = Callable[[Policy, SlotStore, Tensor, float], tuple[Tensor, Tensor | None]]


class FusedStep(Protocol):
    """The decode step of a layer in kernels for one policy class: see `longthink.accelerators`."""

    def __init__(self, policy: Policy) -> None: ...

    def serves(self, store: SlotStore) -> bool:
        """Whether the kernels support the device and dtype of the slots."""
        ...

    def step(self, store: SlotStore, new: QKV, scaling: float) -> Tensor:
        """Equivalent of `decode_step`."""
        ...


def evictable_pages(policy: Policy, table: PageTable) -> Tensor:
    """Pages that may be evicted for the token at `now_B`, bool BKP."""
    return (table.page_BKP >= 0) & ~policy.protected(table)


def choose_slots(
    policy: Policy, table: PageTable, opens_B: Tensor, *, evicts: bool
) -> tuple[Tensor, Moves | None]:
    """Slot for each row's next page, empty or that of the evicted page, and the tokens to save from it.

    Parameters
    ----------
    opens_B
        Rows whose token opens a page; the slot of the others is meaningless.
    evicts
        False if every row that opens a page is known to have an empty slot.
    """
    page_BKP = table.page_BKP
    empty_BKP = page_BKP < 0
    slot_BK = empty_BKP.to(torch.int8).argmax(-1)
    if not evicts:
        return slot_BK, None
    full_BK = (~empty_BKP).sum(-1) >= table.cap_B[:, None]
    evicted_BK = kernels.lowest(policy.worth(table), page_BKP, evictable_pages(policy, table))
    slot_BK = torch.where(full_BK, evicted_BK, slot_BK)
    if not isinstance(policy, SavesTokens):
        return slot_BK, None
    return slot_BK, policy.moves(table, slot_BK, full_BK & opens_B[:, None])


def open_pages(policy: Policy, store: SlotStore, *, evicts: bool) -> None:
    """Open a page in each row whose token at `now_B` starts one; `evicts` as in `choose_slots`."""
    opens_B = store.table.now_B % policy.page_size == 0
    slot_BK, moves = choose_slots(policy, store.table, opens_B, evicts=evicts)
    if moves is not None:
        store.move(moves)
    store.open_pages(slot_BK, opens_B)


def read_slots(
    policy: Policy, store: SlotStore, query_BKGD: Tensor, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """Attention over the pages that the policy selects, or over all resident ones."""
    table = store.table
    selected_BKR = policy.select(table, query_BKGD) if isinstance(policy, SelectsPages) else None
    if selected_BKR is not None:
        keys, values, resident = store.read(selected_BKR)
    else:
        keys, values, resident = store.keys_BKSD, store.values_BKSD, table.resident_BKS
    resident = resident.expand(-1, keys.shape[1], -1)
    many = grows(policy) and selected_BKR is None
    with_weights = "weights" in store.needs
    return kernels.decode_attention(
        query_BKGD, keys, values, resident, scaling, with_weights=with_weights, many=many, rule=store.rule
    )


def decode_step(
    policy: Policy, store: SlotStore, new: QKV, scaling: float, read: Read = read_slots
) -> Tensor:
    """Append the token at `now_B`, attend, let the policy observe, and advance `now_B`.

    Parameters
    ----------
    read
        Returns the attention output over the slots (BKGD) and its weights.

    Returns
    -------
    Tensor
        Attention output, shape BHD.
    """
    query_BHD, key_BKD, value_BKD = new
    query_BKGD = query_BHD.unflatten(1, (key_BKD.shape[1], -1))
    store.append(key_BKD, value_BKD)
    if isinstance(policy, ShiftsKeys):
        shift_keys(policy, store)
    out_BKGD, weights_BKGS = read(policy, store, query_BKGD, scaling)
    shown_BKGD = query_BKGD if reads_vectors(store.needs) else None
    policy.observe(store.table, Step(shown_BKGD, weights_BKGS, scaling))
    store.table.now_B.add_(1)
    return out_BKGD.flatten(1, 2)


def shift_keys(policy: ShiftsKeys, store: SlotStore) -> None:
    """Replace the first keys by those to read in this step; the keys as written are kept aside."""
    count = policy.shifted_tokens()
    if not count:
        return
    assert store.shifted_BKND is not None and store.rotation is not None
    young_B111 = (store.table.now_B < count)[:, None, None, None]
    store.shifted_BKND.copy_(torch.where(young_B111, store.keys_BKSD[:, :, :count], store.shifted_BKND))
    rotation = store.rotation
    keys_BKND = policy.shift_keys(store.table, rotation.paired(store.shifted_BKND), rotation.inv_freq_D)
    store.keys_BKSD[:, :, :count] = rotation.unpaired(keys_BKND)
