"""The decode step of one layer: tensors in, tensors out, the same shapes each time.

What is here reads no Python number that changes from step to step, and waits for no value of the device, so a
compiler makes one program of it; without a compiler it is the eager step. `LayerCache` counts tokens beside it.

Shape suffixes: B batch rows, H query heads, K KV heads, G query heads per KV head, S token slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longthink import kernels
from longthink.cache.store import SlotStore
from longthink.policies import Moves, PageTable, Policy, Step


def choose_slots(
    policy: Policy, table: PageTable, opens_B: Tensor, *, evicts: bool
) -> tuple[Tensor, Moves | None]:
    """Slot for the page of each row's present token, an empty one or the one that gives way; and what leaves it.

    Parameters
    ----------
    opens_B
        Rows whose token opens a page. The others are named a slot as well, which means nothing.
    evicts
        False if it is known that every row that opens a page has an empty slot.
    """
    page_BKP = table.page_BKP
    empty_BKP = page_BKP < 0
    slot_BK = empty_BKP.to(torch.int8).argmax(-1)
    if not evicts:
        return slot_BK, None
    full_BK = (~empty_BKP).sum(-1) >= table.cap_B[:, None]
    victim_BK = kernels.lowest(policy.priority(table), page_BKP, policy.evictable(table))
    slot_BK = torch.where(full_BK, victim_BK, slot_BK)
    return slot_BK, policy.moves(table, slot_BK, full_BK & opens_B[:, None])


def turn_pages(policy: Policy, store: SlotStore, *, evicts: bool) -> None:
    """Give each row that begins a page with its next token a slot, and empty it.

    Parameters
    ----------
    evicts
        False if it is known that every row that opens a page has an empty slot.
    """
    table = store.table
    # Policies see the token to come as the present one; the clock itself moves on in `decode_step`.
    table.now_B.add_(1)
    opens_B = table.now_B % policy.page_size == 0
    slot_BK, moves = choose_slots(policy, table, opens_B, evicts=evicts)
    if moves is not None:
        store.move(moves)
    store.open(slot_BK, opens_B)
    table.now_B.sub_(1)


def save_tokens(policy: Policy, store: SlotStore, full_BK: Tensor) -> None:
    """Save tokens of the pages that give way to the next token's, whose slots `Books` have named.

    Parameters
    ----------
    full_BK
        Where a page gives way.
    """
    table = store.table
    table.now_B.add_(1)
    moves = policy.moves(table, store.tail_BK, full_BK)
    if moves is not None:
        store.move(moves)
    table.now_B.sub_(1)


def read_slots(
    policy: Policy, store: SlotStore, query_BKGD: Tensor, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """Attention over what is resident, or over the pages that the policy selects."""
    table = store.table
    selected_BKR = policy.select(table, query_BKGD)
    if selected_BKR is not None:
        keys, values, resident = store.read(selected_BKR)
    else:
        keys, values, resident = store.keys_BKSD, store.values_BKSD, table.resident_BKS
    resident = resident.expand(-1, keys.shape[1], -1)
    many = policy.grows and selected_BKR is None
    return kernels.decode_attention(
        query_BKGD, keys, values, resident, scaling, with_weights=policy.uses_weights, many=many
    )


New = tuple[Tensor, Tensor, Tensor]
"""A token's query (BHD), key and value (BKD)."""
Read = Callable[[Policy, SlotStore, Tensor, float], tuple[Tensor, Tensor | None]]


def decode_step(
    policy: Policy,
    store: SlotStore,
    new: New,
    scaling: float,
    read: Read = read_slots,
    score_BKP: Tensor | None = None,
) -> Tensor:
    """Write a token, read what is resident, and let the policy learn.

    Parameters
    ----------
    read
        Gives the attention output (BKGD), and its weights, of what is in the slots.
    score_BKP
        Where the scores of the pages go, if they are learned from later, for all layers (`Books`).

    Returns
    -------
    Tensor
        Attention output, shape BHD.
    """
    query_BHD, key_BKD, value_BKD = new
    table = store.table
    table.now_B.add_(1)
    query_BKGD = query_BHD.unflatten(1, (key_BKD.shape[1], -1))
    new_BKD = query_BKGD, key_BKD, value_BKD
    fused = read is read_slots and kernels.fuses_append(query_BKGD)
    if fused and policy.reads_by_bound:
        out_BKGD = kernels.select_attention(*new_BKD, store.slots, table.cap_B, scaling)
        return out_BKGD.flatten(1, 2)
    if fused and reads_all(policy):
        learn = policy.learn(table)._replace(score_BKP=score_BKP)
        out_BKGD, learned = kernels.step_attention(*new_BKD, store.slots, scaling, learn)
        if learn.state_BKS is not None or score_BKP is not None:
            return out_BKGD.flatten(1, 2)
        weights_BKGS, page_score_BKP = (learned, None) if learn.kind == "weights" else (None, learned)
    else:
        store.write(key_BKD, value_BKD)
        store.widen(key_BKD)
        _shift_sinks(policy, store)
        (out_BKGD, weights_BKGS), page_score_BKP = read(policy, store, query_BKGD, scaling), None
    policy.observe(table, Step(query_BKGD, weights_BKGS, scaling, score_BKP=page_score_BKP))
    return out_BKGD.flatten(1, 2)


def reads_all(policy: Policy) -> bool:
    """Whether every resident key is read, as it was written."""
    kind = type(policy)
    return kind.select is Policy.select and kind.key_shift is Policy.key_shift


def _shift_sinks(policy: Policy, store: SlotStore) -> None:
    """Turn the first keys to their place inside the cache, where the policy counts places that way."""
    shift = policy.key_shift(store.table)
    if shift is None:
        return
    assert store.sinks_BKND is not None and store.inv_freq_D is not None
    count, shift_B = shift
    young_B111 = (store.table.now_B < count)[:, None, None, None]
    store.sinks_BKND.copy_(torch.where(young_B111, store.keys_BKSD[:, :, :count], store.sinks_BKND))
    store.keys_BKSD[:, :, :count] = kernels.rotate_keys(store.sinks_BKND, shift_B, store.inv_freq_D)
