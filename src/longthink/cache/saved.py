"""The contents of a layer as named tensors and numbers, and back: what a file of a cache holds of it.

Numbers that come back are not trusted: whatever later serves as an index or a size is checked.

Shape suffixes: B batch rows, K KV heads, P page slots, S token slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longthink.cache.layer import LayerCache
from longthink.cache.rows import PromptPages, RowCounts
from longthink.cache.store import SlotStore
from longthink.cache.tiered_layer import TieredRows
from longthink.cache.tiered_store import TieredStore
from longthink.errors import BudgetError, CacheFileError
from longthink.kernels.reference import wide_dtype
from longthink.policies import grows, needs_budget

_MOST = 2**31 - 1
"""Positions are int32."""
_COUNTS = {"lengths", "caps", "prompts", "spread", "later_turns"}


class LayerShape(NamedTuple):
    """What keys and values of a layer must be: KV heads, head dims, dtype, and the device they are for."""

    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


def layer_contents(layer: LayerCache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the numbers of the rows, ready for JSON; both empty before the prompt."""
    rows = layer.rows
    if not rows.lengths:
        return {}, {}
    counts = {
        "lengths": rows.lengths,
        "caps": rows.caps,
        "prompts": [[list(pages) for pages in prompt.ranges] for prompt in rows.prompts],
        "spread": rows.spread,
        "later_turns": layer.later_turns,
    }
    return layer.store.named_tensors(), counts


def restore_layer(
    layer: LayerCache, tensors: Mapping[str, Tensor], counts: Mapping[str, Any], shape: LayerShape | None
) -> None:
    """Fill an empty layer with what `layer_contents` has returned; a shape is needed where it holds rows.

    Raises
    ------
    CacheFileError
        If tensors and numbers do not fit the policy, the budget, the model and each other.
    """
    if not counts:
        _require(not tensors, f"no rows, but tensors {', '.join(tensors)}")
        return
    assert shape is not None
    rows = _rows(layer, counts)
    keys = tensors.get("keys_BKSD")
    page_size = layer.policy.page_size
    if keys is None or keys.ndim != 4 or keys.shape[2] % page_size:
        found = "none" if keys is None else f"shape {tuple(keys.shape)}"
        raise CacheFileError(f"keys_BKSD: found {found}, expected whole pages of {page_size} tokens")
    none = torch.empty(
        len(rows.lengths), shape.kv_heads, 0, shape.head_dim, dtype=shape.dtype, device=shape.device
    )
    store = _empty_store(layer, rows, tensors, none, shape.value_dim)
    store.keep_shifted(layer.policy, layer.rotation)
    if "query_stats" in layer.policy.needs:
        means = tensors.get("query_means_BN")
        numbers = shape.kv_heads * 3 * (shape.head_dim // 2)
        _require(
            means is not None and means.ndim == 2 and means.shape[1] > 0 and means.shape[1] % numbers == 0,
            f"query_means_BN: expected a multiple of {numbers} numbers in each row",
        )
        assert means is not None
        wide = wide_dtype(shape.dtype)
        empty = torch.empty(len(rows.lengths), means.shape[1], dtype=wide, device=shape.device)
        store.keep_query_stats(empty, layer.rotation)
    _fill(store, tensors)
    _check(store, rows)
    layer._store, layer.rows, layer.later_turns = store, rows, counts["later_turns"]


def _empty_store(
    layer: LayerCache, rows: RowCounts, tensors: Mapping[str, Tensor], none_BKSD: Tensor, value_dim: int
) -> SlotStore:
    """Slots as many as the tensors have, if they are enough for the rows."""
    page_size = layer.policy.page_size
    pages = tensors["keys_BKSD"].shape[2] // page_size
    if isinstance(rows, TieredRows):
        assert layer.kv_bits is not None
        codes = tensors.get("key_codes_BKPN")
        packed = codes.shape[2] if codes is not None and codes.ndim > 2 else 0
        for name, found, needed in zip(
            ("keys_BKSD", "key_codes_BKPN"), (pages, packed), rows.needed, strict=True
        ):
            _require(found >= needed, f"{name} has {found} page slots, expected at least {needed}")
        form = layer.kv_bits, none_BKSD.new_zeros(*none_BKSD.shape[:2], none_BKSD.shape[3]), none_BKSD.dtype
        return TieredStore(layer.policy, none_BKSD, rows.caps, pages, packed, *form)
    needed = -(-max(rows.lengths) // page_size) if grows(layer.policy) else max(rows.caps)
    _require(pages >= needed, f"keys_BKSD has {pages} page slots, expected at least {needed}")
    return SlotStore(layer.policy, none_BKSD, rows.caps, pages, none_BKSD.dtype, value_dim)


def _require(fits: bool, fault: str) -> None:
    if not fits:
        raise CacheFileError(fault)


def _rows(layer: LayerCache, counts: Mapping[str, Any]) -> RowCounts:
    _require(counts.keys() == _COUNTS, f"counts: found {sorted(counts)}, expected {sorted(_COUNTS)}")
    lengths, caps, spread, prompts = (counts[name] for name in ("lengths", "caps", "spread", "prompts"))
    for name, values in (("lengths", lengths), ("caps", caps), ("spread", spread)):
        _require(_are_counts(values), f"{name}={values!r}: expected numbers from 0 to {_MOST}")
    pairs = isinstance(prompts, list) and all(
        isinstance(prompt, list) and all(_are_counts(pair) and len(pair) == 2 for pair in prompt)
        for prompt in prompts
    )
    _require(pairs, f"prompts={prompts!r}: expected pairs of numbers from 0 to {_MOST} for each row")
    _require(
        0 < len(lengths) == len(caps) == len(spread) == len(prompts),
        f"found {len(lengths)} lengths, {len(caps)} caps, {len(spread)} spreads and {len(prompts)} prompts: "
        "expected one of each per row",
    )
    _require(
        isinstance(counts["later_turns"], bool), f"later_turns={counts['later_turns']!r}: expected a bool"
    )
    page_size, budget = layer.policy.page_size, layer.budget
    for length, cap, ranges in zip(lengths, caps, prompts, strict=True):
        pages = -(-length // page_size)
        borders = [border for pair in ranges for border in pair]
        _require(
            borders == sorted(set(borders)) and all(border <= pages for border in borders),
            f"prompt pages {ranges} in a text of {pages} pages of {page_size}",
        )
        count = sum(end - first for first, end in ranges)
        if budget is not None and needs_budget(layer.policy):
            try:
                (least,) = layer.rows.page_caps([count * page_size])
            except BudgetError as error:
                raise CacheFileError(f"cap={cap} pages for {count} prompt pages: {error}") from error
            # Dropping the end of a text takes its prompt pages, but no slots.
            fits = cap >= least if budget.budget is None else cap == least or (layer.kv_bits and cap < least)
            _require(bool(fits), f"cap={cap} pages, expected {least} for {count} prompt pages and {budget}")
    rows = copy(layer.rows)
    rows.lengths, rows.caps = list(lengths), list(caps)
    rows.spread = list(spread)
    rows.prompts = [PromptPages(tuple((first, end) for first, end in ranges)) for ranges in prompts]
    return rows


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MOST for value in values)


def _fill(store: SlotStore, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the slots, if they are those that the slots have."""
    own = store.named_tensors()
    for name in sorted(own.keys() ^ tensors.keys()):
        raise CacheFileError(f"tensor {name} is {'missing' if name in own else 'not one of this policy'}")
    for name, tensor in own.items():
        found, expected = ((x.dtype, tuple(x.shape)) for x in (tensors[name], tensor))
        _require(found == expected, f"tensor {name}: found {_kind(*found)}, expected {_kind(*expected)}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{dtype} of shape {shape}".removeprefix("torch.")


def _check(store: SlotStore, rows: RowCounts) -> None:
    """Check that the page table is one that decoding could have left."""
    table, page_size = store.table, store.table.page_size
    length_B, position_BKS = torch.tensor(rows.lengths, device=table.now_B.device), table.position_BKS
    _require(torch.equal(table.now_B, length_B), f"now_B={table.now_B.tolist()}, expected {rows.lengths}")
    _require(table.cap_B.tolist() == rows.caps, f"cap_B={table.cap_B.tolist()}, expected {rows.caps}")
    _require(
        _within(table.prompt_B, 0, _MOST), f"prompt_B={table.prompt_B.tolist()}, expected numbers from 0"
    )
    _require(_within(store.user_BKP, 0, 1), "user_BKP: expected 0 or 1")
    _require(
        _within(position_BKS, -1, _MOST) and bool((position_BKS < length_B[:, None, None]).all()),
        f"position_BKS: found {_range(position_BKS)}, expected -1 to below the lengths {rows.lengths}",
    )
    ordered = position_BKS.sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    _require(not bool(twice.any()), "position_BKS: a position is in two slots")
    pages = store.pages
    _require(
        _within(store.tail_BK, 0, pages - 1),
        f"tail_BK: found {_range(store.tail_BK)}, expected 0 to {pages - 1}",
    )
    if isinstance(store, TieredStore):
        found_BKD, every_D = store.order_BKD.sort(-1).values, torch.arange(store.keys_BKSD.shape[3])
        _require(
            bool((found_BKD == every_D.to(found_BKD.device)).all()),
            "channel_order_BN: not an order of channels",
        )
    # The next token must not overwrite one.
    offset_B1 = length_B[:, None] % page_size
    next_BK = position_BKS.gather(2, (store.tail_BK * page_size + offset_B1)[..., None])[..., 0]
    _require(bool(((next_BK < 0) | (offset_B1 == 0)).all()), "tail_BK: the slot of the next token is taken")


def _within(tensor: Tensor, low: int, high: int) -> bool:
    return bool(((tensor >= low) & (tensor <= high)).all())


def _range(tensor: Tensor) -> str:
    return f"{int(tensor.min())} to {int(tensor.max())}" if tensor.numel() else "nothing"
