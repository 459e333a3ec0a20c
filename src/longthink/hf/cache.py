"""`PagedCache`: a transformers `Cache` with a bounded number of page slots.

It is what users create; each layer with full attention is a `PagedLayer` over a `LayerCache`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from longthink.accelerators import fused_steps
from longthink.cache import FusedStep, LayerCache, TieredCache, with_pages
from longthink.config import DEFAULT_POLICY, KV_DTYPES, Budget, KvBits, check_choice, check_int
from longthink.errors import BudgetError, CacheStateError, UnsupportedModelError
from longthink.hf.binding import ModelBinding, outside_inference
from longthink.hf.columns import Columns
from longthink.hf.fingerprint import head_dim
from longthink.hf.guard import check_new
from longthink.hf.layer import PagedHybridLayer, PagedLayer
from longthink.hf.layer_kinds import has_pages, is_recurrent, library_layers
from longthink.hf.placement import device_of
from longthink.hf.query_stats import calibrated_means
from longthink.hf.refusals import Refusals
from longthink.hf.rotation import rotations
from longthink.hf.rows import CacheRows
from longthink.hf.self_check import self_check
from longthink.hf.support import check_model, shares_keys, text_limit
from longthink.policies import (
    Dense,
    Policy,
    ShiftsKeys,
    make_policy,
    needs_budget,
    policy_budget,
    policy_spec,
)


class PagedCache(Refusals, CacheRows):
    """Bounded KV cache for one model; use `make_cache` to create one.

    Layers that are bounded by nature have windows and states instead of pages (`NativeLayers`).

    While it is open, the model's attention goes through longthink (other caches still work); `close` restores the
    model's own attention. It is a context manager, and is closed when it is garbage-collected.

    The parameters are those of `make_cache`, with policy and budget as objects; `fused` are the fused decode steps by
    exact policy class, by default those available on the model's device.
    """

    def __init__(
        self, model: PreTrainedModel, policy: Policy, budget: Budget | None, batch_size: int | None = None,
        kv_dtype: str | None = None, fused: Mapping[type[Policy], type[FusedStep]] | None = None,
        kv_bits: KvBits | None = None,
    ) -> None:  # fmt: skip
        self.policy = policy = policy if kv_bits is None else with_pages(policy, kv_bits)
        self.kv_bits = kv_bits
        self._fused = fused_steps(device_of(model)) if fused is None else fused
        self.kv_dtype = kv_dtype
        self.budget = budget
        self.required_rows = batch_size
        layers = library_layers(model.config)
        places = [i for i, layer in enumerate(layers) if has_pages(layer)]
        self.binding = ModelBinding(model, text_limit(model), first_layer=places[0])
        slots = self._slots(model, places)
        self._text = Columns(list(slots.values()), rewinds=not any(map(is_recurrent, layers)))
        for i, own in slots.items():
            place = i, own, self.binding, self._text
            states = layers[i].number_of_states if is_recurrent(layers[i]) else None
            layers[i] = PagedLayer(*place) if states is None else PagedHybridLayer(*place, states)
        super().__init__(layers=layers)
        self.paged = [layers[i] for i in places]
        self.natives = {i: layer for i, layer in enumerate(layers) if i not in slots}
        used = [is_recurrent(layer) or isinstance(layer, CacheLayerMixin) for layer in layers]
        self.first_used = used.index(True)
        self._before = {i: self.paged[n - 1] if n else None for n, i in enumerate(places)}
        self.open()

    def _slots(self, model: PreTrainedModel, places: list[int]) -> dict[int, LayerCache]:
        """The pages of each layer that has some."""
        policy = self.policy
        policies = {i: policy.for_layer(i) for i in places}
        rotated = [
            i
            for i, own in policies.items()
            if "query_stats" in own.needs or (isinstance(own, ShiftsKeys) and own.shifted_tokens())
        ]
        rotation = rotations(model, rotated) if rotated else {}
        means = calibrated_means(model, policies)
        if needs_budget(policy) and not any(map(needs_budget, policies.values())):
            raise BudgetError(
                f"policy {policy_spec(policy)!r} keeps everything in all {len(places)} layers of the model: the "
                "budget would have no effect"
            )
        return {
            i: self._new_layer(own, rotation=rotation.get(i), query_means_N=means.get(i))
            for i, own in policies.items()
        }

    def _new_layer(self, policy: Policy, **known: Any) -> LayerCache:
        model = self.binding.model
        shares = shares_keys(model.config)
        if shares and self.kv_bits is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has layers that read the keys and values of others, which kv_bits does not "
                "support: keep them in full"
            )
        dtype = None if self.kv_dtype is None else getattr(torch, self.kv_dtype)
        if self.kv_bits is None:
            layer = LayerCache(
                policy, self.budget, kv_dtype=dtype, fused={} if shares else self._fused, **known
            )
            layer.shares_keys = shares
            return layer
        return TieredCache(
            policy, self.budget, kv_dtype=dtype, kv_bits=self.kv_bits, head_dim=head_dim(model),
            dtype=dtype or model.dtype, **known,
        )  # fmt: skip

    # Opening and closing ------------------------------------------------------------------------------------

    def open(self) -> Self:
        """Route the model's attention through this cache (the constructor does; needed again after `close`)."""
        self.binding.open(self)
        return self

    def close(self) -> None:
        """Restore the model's own attention implementation; the contents stay."""
        self.binding.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self.binding.use.ignore()
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the contents, bound to the same model or to a copy made by the same call; open if this one is."""
        model = self.binding.model
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        memo[id(self.binding)] = self.binding.copy_for(memo.get(id(model), model))
        for name, value in self.__dict__.items():
            setattr(other, name, copy.deepcopy(value, memo))
        return other.open() if self.binding.is_open else other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the contents to a safetensors file, which `load_cache` reads. A closed cache can be saved too.

        The file appears as a whole: an error, or the end of the process, leaves the old one.

        Raises
        ------
        CacheStateError
            In the middle of a chunked prefill or after an interrupted step.
        CacheFileError
            If the file cannot be written.
        """
        from longthink.hf.saving import save_cache  # which creates caches

        self._check_complete()
        save_cache(self, Path(path))

    @contextmanager
    def begin_chunked_prefill(self, columns: int) -> Iterator[None]:
        """Treat the next columns as one prompt, even if they are split over several calls of the model.

        The result is that of a single call. Until the last column has been read, the keys and values of all columns
        are kept, in all layers. Leaving the ``with`` block before that resets the cache.

        Parameters
        ----------
        columns
            Columns of the prompt, including padding.
        """
        check_int("columns", columns, 1)
        for layer in self.paged:
            layer.slots.begin_chunked_prefill(columns)
        try:
            yield
        finally:
            if any(layer.slots.in_chunked_prefill for layer in self.paged):
                self.reset()

    def check_new(self, columns: int) -> None:
        """Raise unless the cache can take in so many new columns: none is too few."""
        self._check_complete()
        check_new(columns, self.columns)

    def check_room(self, mask_BN: Tensor | None, columns: int) -> None:
        """Raise `BudgetError` if a later turn of so many columns, with this mask, does not fit."""
        counts = None if mask_BN is None else mask_BN[:, -columns:].sum(1).tolist()
        if self.rows and (counts is None or len(counts) == self.rows):
            for layer in self.paged:
                layer.slots.check_room(None, counts, columns)

    # Interface of transformers ------------------------------------------------------------------------------

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the new keys and values of a layer, B x K x Q x D, if the cache is open and the model the right one."""
        self._enter(key_states, layer_idx)
        if layer_idx in self.natives:
            return outside_inference(super().update)(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.paged[0].index:
            self.binding.add_use(len(key_states), self.columns + key_states.shape[2])
        self._check_layer(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _enter(self, new: Tensor, layer_idx: int) -> None:
        if layer_idx == self.first_used:
            self.binding.check_open()
            self._check_rows(len(new))
            if self.rows not in (0, len(new)):
                raise CacheStateError(f"the cache holds {self.rows} rows and was given {len(new)}")

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Size and offset of the mask. Models ask before their layers run, so errors surface before any change."""
        self.binding.check_open()
        self.check_new(query_length)
        self.binding.use.check_limit(self.columns + query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of text seen, including padding; the library asks before each pass of the model."""
        self.binding.use.asked = True
        return super().get_seq_length(layer_idx)

    def _check_rows(self, rows: int) -> None:
        if self.required_rows is not None and rows != self.required_rows:
            raise CacheStateError(
                f"the cache was made for batch_size={self.required_rows} and was given {rows} rows"
            )

    def _check_complete(self) -> None:
        self._check_pages_complete(natives=self._natives_complete())

    def _check_pages_complete(self, *, natives: bool = True) -> None:
        if not natives or any(layer.pending or layer.columns != self.columns for layer in self.paged):
            raise CacheStateError(
                "a step on this cache was interrupted: call cache.reset() or create a new one"
            )

    def _check_layer(self, index: int) -> None:
        """Raise unless keys of this layer come next: each layer attends before the next one adds its keys."""
        if index >= len(self.layers):
            raise CacheStateError(
                f"this cache has {len(self.layers)} layers and was given keys of layer {index}: it is for another "
                "model"
            )
        layer, before = self.layers[index], self._before[index]
        if layer.pending:
            raise UnsupportedModelError(
                f"layer {index} has stored keys twice in one step: either the model stores more than one key per "
                "layer, which a bounded cache does not support, or a step was interrupted; then call cache.reset()"
            )
        if before is None:
            self._check_pages_complete()
        elif before.pending:
            before.pending = False  # nothing was appended
            raise CacheStateError(
                "the running model does not use this cache for attention: it is for another model; create one "
                "with make_cache(model, ...)"
            )

    # For `DecodeStep` and `ForcedDecode`, which do not use `update` ----------------------------------------

    @property
    def sizes(self) -> tuple[tuple[torch.Size, int], ...]:
        """`LayerCache.sizes` of each layer: a compiled step is valid until they change."""
        return tuple(layer.slots.sizes for layer in self.paged)

    @outside_inference
    def begin_step(self, rows: int) -> bool:
        """Count one more token for every row, and return whether any row begins a page."""
        self.begin_block(rows, 1)
        opens = False
        for layer in self.paged:
            opens |= layer.slots.begin_step() is not None
        return opens

    def begin_block(self, rows: int, tokens: int) -> None:
        """Prepare for so many decode steps, which each layer counts by itself."""
        self.binding.check_open()
        self._check_rows(rows)
        self._check_complete()
        if rows != self.rows:
            raise CacheStateError(f"the cache holds {self.rows} rows and was given {rows}")
        # Rows of a batch that changes are shorter than the columns that it has read.
        self.binding.use.check_limit(max(self.paged[0].slots.rows.lengths) + tokens)
        self.binding.add_use(rows, self.columns + tokens)
        self._begin_windows(tokens)
        for layer in self.paged:
            layer.pending = True

    def prepare_compile(self) -> None:
        """Mark dynamic sizes and static addresses for the compiler."""
        for layer in self.paged:
            layer.slots.prepare_compile()
        for window in self.windows.values():
            window.prepare_compile()

    def end_step(self, tokens: int = 1) -> None:
        """Complete the steps that `begin_step` or `begin_block` began."""
        self._text.add_tokens(tokens)
        for window in self.windows.values():
            window.columns += tokens
        for layer in self.paged:
            layer.pending = False
            layer.columns += tokens


def make_cache(
    model: PreTrainedModel,
    *,
    policy: str | Policy = DEFAULT_POLICY,
    budget: int | None = None,
    decode_budget: int | None = None,
    batch_size: int | None = None,
    kv_dtype: str | None = None,
    kv_bits: KvBits | int | str | None = None,
) -> PagedCache:
    """Create a cache for ``model.generate(..., past_key_values=cache)``, for any number of turns.

    Unsupported features raise an error when the model is called. The first cache of a kind of model runs a short text
    through it: see ``docs/verify.md``.

    Parameters
    ----------
    model
        A decoder-only transformers model. Layers with full attention are bounded; others have a bound of their own.
    policy
        A policy, its name, or a spec such as ``raas:r=0.25``.
    budget, decode_budget
        Tokens to keep per layer and row: including the prompt, or on top of it. Give one; neither for ``dense``.
    batch_size
        The only number of rows to accept; None accepts any.
    kv_dtype
        Format that keys and values are stored in: ``bfloat16``, ``float16`` or ``float32``; None for the model's own.
        16 bits halve the bytes for a float32 model; whether they save time depends on the processor.
    kv_bits
        Bits at which pages are stored that have left a window of recent tokens: 8, 4, 3 or 2, or keys / values such
        as ``"4/2"``; None stores all in full. The same bytes then hold more tokens: ``docs/precision.md``.

    Raises
    ------
    UnsupportedModelError
        If the model is not supported.
    BudgetError
        If the budget does not suit the policy.
    ValueError
        If an argument is out of range.
    """
    policy = make_policy(policy)
    if batch_size is not None:
        check_int("batch_size", batch_size, 1)
    if kv_dtype is not None:
        check_choice("kv_dtype", kv_dtype, KV_DTYPES)
    check_model(model)
    self_check(model, lambda: PagedCache(model, Dense(), None))
    bits = KvBits.parse(kv_bits)
    bound = policy_budget(policy, budget, decode_budget)
    return PagedCache(model, policy, bound, batch_size, kv_dtype, kv_bits=bits)
