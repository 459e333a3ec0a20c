"""What a file of a cache holds of its layers without pages: windows, and recurrent states and convolutions.

Tensors are ``natives.<layer>.<name>``; what a window counts is JSON. Shapes are those that the model gives a sample.

Shape suffixes: B batch rows, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from longthink.cache.window import Window
from longthink.errors import CacheFileError, UnsupportedFeatureError
from longthink.hf.cache import PagedCache
from longthink.hf.layer_kinds import STATE_FLAGS, STATES, is_recurrent, set_states, states_of

_KNOWN = {*STATES, *STATE_FLAGS, "number_of_states", "device", "dtype", "record_past"}
"""Attributes of transformers' recurrent layers; a file holds the states, and a sample has the rest."""

_SLOTS = {"keys_BKSD": 2, "values_BKSD": 2, "column_BS": 1}
"""The dimension of the slots, which are fewer than the window while the text is short."""


def native_contents(cache: PagedCache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and numbers by layer, ready for JSON.

    Raises
    ------
    UnsupportedFeatureError
        If a recurrent layer has attributes that this version does not know.
    """
    tensors: dict[str, Tensor] = {}
    counts: dict[str, Any] = {}
    for i, window in cache.windows.items():
        tensors |= {f"natives.{i}.{name}": tensor for name, tensor in window.named_tensors().items()}
        counts[str(i)] = {
            "size": window.size, "chunked": window.chunked, "columns": window.columns, "aligned": window.aligned,
        }  # fmt: skip
    for i, layer in enumerate(cache.layers):
        if is_recurrent(layer):
            own = vars(LinearAttentionLayer()) if i not in cache.natives else vars(layer)
            if unknown := own.keys() - _KNOWN:
                raise UnsupportedFeatureError(
                    f"layer {i}, a {type(layer).__name__} of this version of transformers, keeps "
                    f"{', '.join(sorted(unknown))}, which no file of a cache holds: copy.deepcopy copies the cache "
                    "within a process"
                )
            tensors |= {f"natives.{i}.{name}": tensor for name, tensor in _named_states(layer).items()}
    return tensors, counts


def restore_natives(
    cache: PagedCache, tensors: dict[str, Tensor], counts: Any, columns: int, sample: PagedCache | None
) -> None:
    """Fill these layers of an empty cache with what `native_contents` has returned, and take it out of `tensors`.

    `sample` is a cache of the same model that has read something; None if the file holds no text.

    Raises
    ------
    CacheFileError
        If tensors and numbers do not fit the model and each other.
    """
    windows = {str(i): window for i, window in cache.windows.items()}
    found = {} if counts is None else counts
    if not isinstance(found, dict) or found.keys() != windows.keys():
        kinds = sorted(found) if isinstance(found, dict) else found
        raise CacheFileError(f"natives: found windows in layers {kinds}, expected {sorted(windows)}")
    for i, layer in enumerate(cache.layers):
        prefix = f"natives.{i}."
        own = {name.removeprefix(prefix): tensors.pop(name) for name in [*tensors] if name.startswith(prefix)}
        try:
            if i in cache.windows:
                _check_kind(cache.windows[i], found[str(i)])
                if sample is not None:
                    text = cache.rows, columns
                    _restore_window(cache.windows[i], own, found[str(i)], text, sample.windows[i])
                    own = {}
            elif is_recurrent(layer) and sample is not None:
                _restore_states(layer, own, cache.rows, sample.layers[i])
                cache._last_state, own = i, {}
            if own:
                raise CacheFileError(f"unexpected tensors {', '.join(own)}")
        except CacheFileError as error:
            raise CacheFileError(f"layer {i}: {error}") from error.__cause__


# Windows --------------------------------------------------------------------------------------------------------


def _check_kind(window: Window, counts: Any) -> None:
    expected = {"size": window.size, "chunked": window.chunked}
    found = {name: counts.get(name) for name in expected} if isinstance(counts, dict) else counts
    if found != expected or counts.keys() != {*expected, "columns", "aligned"}:
        raise CacheFileError(f"found a window of {found}, expected {expected}")


def _restore_window(
    window: Window,
    tensors: Mapping[str, Tensor],
    counts: Mapping[str, Any],
    text: tuple[int, int],
    sample: Window,
) -> None:
    rows, columns = text
    read, aligned = counts["columns"], counts["aligned"]
    if type(read) is not int or not isinstance(aligned, bool) or read < 1 or (aligned and read != columns):
        raise CacheFileError(f"columns={read!r}, aligned={aligned!r}: expected a bool and {columns} columns")
    _check_tensors(tensors, sample.named_tensors(), rows, _SLOTS)
    column_BS, now_B, start_B = (tensors[name] for name in ("column_BS", "now_B", "start_B"))
    slots = column_BS.shape[1]
    slot_S = torch.arange(slots)
    held_BS = column_BS >= 0
    fits = (
        min(read, window.size) <= slots <= window.size
        and all(tensors[name].shape[2] == slots for name in ("keys_BKSD", "values_BKSD"))
        and bool(((now_B == read) if aligned else (now_B > 0) & (now_B <= read)).all())
        and bool(((start_B >= 0) & (start_B <= now_B)).all())
        and bool(((column_BS >= -1) & (column_BS < now_B[:, None])).all())
        and bool((~held_BS | (column_BS % slots == slot_S)).all())
        and bool((~held_BS | (column_BS >= now_B[:, None] - slots)).all())
    )
    if not fits:
        raise CacheFileError(
            f"column_BS, now_B={now_B.tolist()}, start_B={start_B.tolist()}: these are not the last columns of "
            f"{read} in {slots} slots"
        )
    window.restore({name: tensor.to(sample.now_B.device) for name, tensor in tensors.items()})
    window.columns, window.aligned = read, aligned


# States ---------------------------------------------------------------------------------------------------------


def _named_states(layer: Any) -> dict[str, Tensor]:
    return {f"{name}.{key}": state for (name, key), state in states_of(layer).items()}


def _restore_states(layer: Any, tensors: Mapping[str, Tensor], rows: int, sample: Any) -> None:
    _check_tensors(tensors, _named_states(sample), rows, {})
    found = {at: tensors["{}.{}".format(*at)].to(sample.device) for at in states_of(sample)}
    set_states(layer, found, sample)


# Both -----------------------------------------------------------------------------------------------------------


def _check_tensors(
    tensors: Mapping[str, Tensor], sample: Mapping[str, Tensor], rows: int, varies: Mapping[str, int]
) -> None:
    """Compare names, kinds of numbers and shapes with those of one row, in all dimensions but one that `varies`."""
    for name in sorted(tensors.keys() ^ sample.keys()):
        raise CacheFileError(f"tensor {name} is {'missing' if name in sample else 'not one of this model'}")
    for name, tensor in tensors.items():
        expected = [rows, *sample[name].shape[1:]]
        if name in varies and tensor.ndim == len(expected):
            expected[varies[name]] = tensor.shape[varies[name]]
        kinds = {tensor.dtype, sample[name].dtype}
        alike = len(kinds) == 1 or all(kind.is_floating_point for kind in kinds)
        if list(tensor.shape) != expected or not alike:
            raise CacheFileError(
                f"tensor {name}: found {tensor.dtype} of shape {list(tensor.shape)}, expected "
                f"{sample[name].dtype} of shape {expected}"
            )
