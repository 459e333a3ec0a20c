"""Saving a cache, for the same model in another process, and loading it.

The file holds every tensor of every layer, ``layers.<i>.<name>``, and which columns are padding; the rest is JSON.
What is read is not trusted: it must fit the model, the policy, the budget and itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longthink.cache.saved import LayerShape, layer_contents, restore_layer
from longthink.config import KV_DTYPES, KvBits, check_choice, check_int
from longthink.errors import CacheFileError, CacheStateError, UnknownPolicyError
from longthink.hf.binding import outside_inference
from longthink.hf.cache import PagedCache
from longthink.hf.cachefile import naming_file, read_cache_file, write_cache_file
from longthink.hf.fingerprint import model_fingerprint
from longthink.hf.placement import device_of
from longthink.hf.probe import undisturbed
from longthink.hf.saved_natives import native_contents, restore_natives
from longthink.hf.support import check_model, text_tokens
from longthink.policies import (
    Policy,
    make_policy,
    policy_budget,
    policy_from_dict,
    policy_spec,
    policy_to_dict,
)

_FIELDS = set(
    "model policy budget decode_budget kv_dtype batch_size keys_dtype columns comparable layers".split()
)
_REAL = "columns.real_BN"


def save_cache(cache: PagedCache, path: Path) -> None:
    """Write a cache: see `PagedCache.save`."""
    if any(layer.slots.in_chunked_prefill for layer in cache.paged):
        raise CacheStateError(
            "the cache is in the middle of a chunked prefill: save it once the prompt is read"
        )
    columns, comparable, real_BN = cache.paged[0].text.contents()
    if columns != cache.get_seq_length():
        raise CacheStateError("a step on this cache was interrupted: call cache.reset() or create a new one")
    tensors = {} if real_BN is None else {_REAL: real_BN}
    layers = []
    for i, layer in enumerate(cache.paged):
        named, counts = layer_contents(layer.slots)
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in named.items()}
        layers.append(counts)
    # Autocast may have made the keys of another dtype than the model's.
    dtype = cache.paged[0].slots.store.keys_BKSD.dtype if cache.rows else None
    contents = {
        "model": model_fingerprint(cache.binding.model),
        "policy": policy_to_dict(cache.policy),
        "budget": None if cache.budget is None else cache.budget.budget,
        "decode_budget": None if cache.budget is None else cache.budget.decode_budget,
        "kv_dtype": cache.kv_dtype,
        "batch_size": cache.required_rows,
        "keys_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "columns": columns,
        "comparable": comparable,
        "layers": layers,
    }
    if cache.kv_bits is not None:
        contents["kv_bits"] = str(cache.kv_bits)
    if cache.is_mixed:
        named, contents["natives"] = native_contents(cache)
        tensors |= named
    write_cache_file(path, contents, tensors)


@outside_inference
def load_cache(
    model: PreTrainedModel, path: str | os.PathLike[str], *, policy: str | Policy | None = None
) -> PagedCache:
    """Read a cache that `PagedCache.save` has written, as an open cache for this model, on its device.

    Decoding goes on as it would have with the original. Every call returns an independent cache, so the file of a
    long prompt serves any number of conversations; within one process, ``copy.deepcopy`` of a cache does.

    Parameters
    ----------
    model
        The model that filled the cache: class, sizes, dtype and (sampled) weights are compared.
    path
        The file.
    policy
        The policy of the file: an object if its class is not registered, otherwise only a check.

    Raises
    ------
    CacheFileError
        If the file cannot be read, is damaged, has another format version, or holds a cache of another model or
        policy.
    UnsupportedModelError
        If the model is not supported.
    """
    check_model(model)
    given = None if policy is None else make_policy(policy)
    with naming_file(Path(path)):
        contents, tensors = read_cache_file(Path(path))
        if contents.keys() - {"kv_bits", "natives"} != _FIELDS:
            raise CacheFileError(f"found the fields {sorted(contents)}, expected {sorted(_FIELDS)}")
        _check_model(model, contents["model"])
        cache = _empty_cache(model, contents, given)
        try:
            _fill(cache, contents, tensors)
        except BaseException:
            cache.close()
            raise
    return cache


def _check_model(model: PreTrainedModel, found: Any) -> None:
    for name, expected in model_fingerprint(model).items():
        value = found.get(name) if isinstance(found, dict) else None
        if value != expected:
            raise CacheFileError(
                f"it belongs to another model: found {name}={value!r}, expected {expected!r} for this "
                f"{type(model).__name__}"
            )


def _empty_cache(model: PreTrainedModel, contents: Mapping[str, Any], given: Policy | None) -> PagedCache:
    saved, kv_dtype, batch_size = (contents[name] for name in ("policy", "kv_dtype", "batch_size"))
    if given is not None and json.loads(json.dumps(policy_to_dict(given))) != saved:
        raise CacheFileError(f"found policy {saved!r}, expected {policy_spec(given)!r}")
    try:
        policy = policy_from_dict(saved) if given is None else given
        if kv_dtype is not None:
            check_choice("kv_dtype", kv_dtype, KV_DTYPES)
        if batch_size is not None:
            check_int("batch_size", batch_size, 1)
        budget = policy_budget(policy, contents["budget"], contents["decode_budget"])
        kv_bits = KvBits.parse(contents.get("kv_bits"))
        return PagedCache(model, policy, budget, batch_size, kv_dtype, kv_bits=kv_bits)
    except UnknownPolicyError as error:
        raise CacheFileError(f"{error}; give the policy as an object: load_cache(..., policy=...)") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # options of any type
        raise CacheFileError(f"found policy {saved!r}, which is invalid: {error}") from error


def _fill(cache: PagedCache, contents: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    layers, dtype = contents["layers"], contents["keys_dtype"]
    if not isinstance(layers, list) or not all(isinstance(counts, dict) for counts in layers):
        raise CacheFileError("layers: expected a list of objects")
    lengths = [counts.get("lengths") for counts in layers]
    if lengths != [lengths[0] if lengths else None] * len(cache.paged):
        raise CacheFileError(f"lengths={lengths}: expected the same for each of {len(cache.paged)} layers")
    if any(layers) and cache.required_rows not in (None, len(lengths[0])):
        raise CacheFileError(
            f"batch_size={cache.required_rows}: expected {len(lengths[0])}, as there are rows"
        )
    allowed = (*KV_DTYPES, "float64") if cache.kv_dtype is None else (cache.kv_dtype,)
    if any(layers) and dtype not in allowed:
        raise CacheFileError(f"keys_dtype={dtype!r}: expected one of {', '.join(allowed)}")
    sample = _sample(cache) if any(layers) else None
    rest = dict(tensors)
    real_BN = rest.pop(_REAL, None)
    for i, (layer, counts) in enumerate(zip(cache.paged, layers, strict=True)):
        prefix = f"layers.{i}."
        own = {name.removeprefix(prefix): rest.pop(name) for name in tensors if name.startswith(prefix)}
        shape = None
        if sample is not None:
            store, layer.expands = sample.paged[i].slots.store, sample.paged[i].expands
            dims = store.keys_BKSD.shape[1], store.keys_BKSD.shape[3], store.values_BKSD.shape[3]
            shape = LayerShape(*dims, getattr(torch, dtype or "float32"), store.keys_BKSD.device)
        try:
            restore_layer(layer.slots, own, counts, shape)
        except CacheFileError as error:
            raise CacheFileError(f"layer {i}: {error}") from error.__cause__
        layer.columns, layer.is_initialized = contents["columns"], bool(counts)
    restore_natives(cache, rest, contents.get("natives"), contents["columns"], sample)
    if rest:
        raise CacheFileError(f"unexpected tensors {', '.join(rest)}")
    _fill_columns(cache, contents["columns"], contents["comparable"], real_BN)


def _sample(cache: PagedCache) -> PagedCache:
    """A cache of the same model that has read one token, closed: what its layers hold has the shapes to expect."""
    model = cache.binding.model
    with undisturbed(model), cache.fresh() as sample:
        model(text_tokens(model, 1)[None], past_key_values=sample)
    return sample


def _fill_columns(cache: PagedCache, columns: Any, comparable: Any, real_BN: Tensor | None) -> None:
    if type(columns) is not int or not isinstance(comparable, bool) or not 0 <= columns < 2**31:
        raise CacheFileError(f"columns={columns!r}, comparable={comparable!r}: expected a number and a bool")
    lengths = cache.paged[0].slots.rows.lengths
    if real_BN is not None:
        shape = (len(lengths), columns)
        if real_BN.dtype != torch.bool or real_BN.shape != shape:
            raise CacheFileError(
                f"tensor {_REAL}: found {tuple(real_BN.shape)}, expected bool of shape {shape}"
            )
        real_BN = real_BN.to(device_of(cache.binding.model))
    real = [columns] * len(lengths) if real_BN is None else real_BN.sum(1).tolist()
    if (comparable and real != lengths) or (columns and not lengths):
        raise CacheFileError(f"columns={columns}, not padding {real}: expected the lengths {lengths}")
    cache.paged[0].text.restore(columns, comparable, real_BN)
