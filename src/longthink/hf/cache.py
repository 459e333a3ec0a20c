"""`PagedCache`: a transformers `Cache` of fixed page slots."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from longthink.accelerators import fused_steps
from longthink.cache import FusedStep, LayerCache
from longthink.config import DEFAULT_POLICY, KV_DTYPES, Budget, check_choice, check_int
from longthink.errors import BudgetError, CacheStateError, UnsupportedFeatureError, UnsupportedModelError
from longthink.hf.binding import ModelBinding, outside_inference
from longthink.hf.layer import PagedLayer
from longthink.hf.support import check_model, rope_frequencies
from longthink.policies import Policy, make_policy, needs_budget, policy_budget, policy_spec, policy_to_dict


class PagedCache(Cache):
    """KV cache of fixed page slots for one model; use `make_cache` to create one.

    While it is open, the model attends through longthink (other caches still work); closing it gives the model
    its own attention implementation back. It is a context manager, and closes itself when it is collected.

    Parameters
    ----------
    model
        The model that will use it.
    policy
        What to keep.
    budget
        How much to keep, or None for a policy that needs none.
    batch_size
        Rows it is meant for; other numbers are refused. None takes any.
    kv_dtype
        Format that keys and values are kept in, one of `longthink.config.KV_DTYPES`; None for the model's own.
    fused
        Decode steps by exact class of policy; None for those that there are for the model's device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        budget: Budget | None,
        batch_size: int | None = None,
        kv_dtype: str | None = None,
        fused: Mapping[type[Policy], type[FusedStep]] | None = None,
    ) -> None:
        self.policy = policy
        self._fused = fused_steps(model.device) if fused is None else fused
        self.kv_dtype = kv_dtype
        self.budget = budget
        self._rows = batch_size
        self.binding = ModelBinding(model)
        frequencies = rope_frequencies(model)
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        dtype = None if kv_dtype is None else getattr(torch, kv_dtype)
        slots = [
            LayerCache(policy.for_layer(i), budget, inv_freq_D=frequencies, kv_dtype=dtype, fused=self._fused)
            for i in range(count)
        ]
        if needs_budget(policy) and not any(needs_budget(layer.policy) for layer in slots):
            raise BudgetError(
                f"policy {policy_spec(policy)!r} keeps everything in all {count} layers of the model: the budget "
                "would bound nothing"
            )
        super().__init__(layers=[PagedLayer(layer, self.binding) for layer in slots])
        self.open()

    # Opening and closing ------------------------------------------------------------------------------------

    def open(self) -> Self:
        """Let the model attend over this cache (done by the constructor; needed again after `close`)."""
        self.binding.open(self)
        return self

    def close(self) -> None:
        """Give the model its own attention implementation back; the contents stay."""
        self.binding.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the contents, for the same model or for the copy of it that is made along; open if this one is."""
        model = self.binding.model
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        memo[id(self.binding)] = ModelBinding(memo.get(id(model), model))
        for name, value in self.__dict__.items():
            setattr(other, name, copy.deepcopy(value, memo))
        return other.open() if self.binding.is_open else other

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse: what it holds means something to its model alone."""
        raise UnsupportedFeatureError(
            "a longthink cache belongs to a model in this process and cannot be pickled; copy.deepcopy copies it"
        )

    @contextmanager
    def begin_chunked_prefill(self, columns: int) -> Iterator[None]:
        """Take the next columns as one prompt, in however many calls of the model they come.

        What follows is as if they had come in one call. Until the last column is there, keys and values of all of
        them are held, in all layers. If the ``with`` block is left before, the cache is reset.

        Parameters
        ----------
        columns
            Columns of the prompt, padding included.

        Raises
        ------
        UnsupportedFeatureError
            If the cache has read a prompt and decoded nothing since. On one that has decoded, this changes nothing.
        """
        check_int("columns", columns, 1)
        for layer in self.layers:
            layer.slots.begin_chunked_prefill(columns)
        try:
            yield
        finally:
            if any(layer.slots.in_chunked_prefill for layer in self.layers):
                self.reset()

    # The library's interface --------------------------------------------------------------------------------

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in the new keys and values of a layer.

        Raises
        ------
        CacheStateError
            If the cache is closed or another model's, a step was interrupted, or the number of rows is not the one
            asked for.
        UnsupportedModelError
            If the model stores more than one key per layer.
        """
        if layer_idx == 0:
            self.binding.check_open()
            self._check_rows(len(key_states))
        self._check_layer(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Size and offset of the mask. A model asks before its layers run, so faults are found before anything is."""
        self.binding.check_open()
        self._check_complete()
        return super().get_mask_sizes(query_length, layer_idx)

    def _check_rows(self, rows: int) -> None:
        if self._rows is not None and rows != self._rows:
            raise CacheStateError(f"the cache was made for batch_size={self._rows} and was given {rows} rows")

    def _check_complete(self) -> None:
        if any(layer.pending or layer.columns != self.layers[0].columns for layer in self.layers):
            raise CacheStateError(
                "a step on this cache was interrupted: call cache.reset() or make a new one"
            )

    def _check_layer(self, index: int) -> None:
        """Raise unless keys of this layer are what comes next: a layer attends before the next one's keys come."""
        if index >= len(self.layers):
            raise CacheStateError(
                f"this cache has {len(self.layers)} layers and was given keys of layer {index}: it is for another "
                "model"
            )
        layer, before = self.layers[index], self.layers[index - 1]
        if layer.pending:
            raise UnsupportedModelError(
                f"layer {index} has stored keys twice in one step: either the model stores more than one key per "
                "layer, which a bounded page cache cannot serve right, or a step was interrupted: then call "
                "cache.reset()"
            )
        if index == 0:
            self._check_complete()
        elif before.pending:
            before.pending = False  # nothing was taken in
            raise CacheStateError(
                "the model that runs does not attend over this cache: it is for another model; make one with "
                "make_cache(model, ...)"
            )

    def activate_past_recording(self) -> None:
        """Refuse: asked for by assisted decoding, which takes tokens back."""
        raise UnsupportedFeatureError(
            "assisted decoding takes tokens back, and evicted tokens cannot come back: generate without assistant "
            "model and prompt lookup, or use transformers' own cache"
        )

    @property
    def max_cache_len(self) -> int:
        """Refuse: asked for by prefix tuning of PEFT, which fills the cache with vectors of no token."""
        raise UnsupportedFeatureError(
            "prefix tuning fills a cache with vectors of no token, which a policy cannot count: use transformers' "
            "own cache"
        )

    # The step of `DecodeStep`, which does not come through `update` --------------------------------------------

    @property
    def rows(self) -> int:
        """Rows that it holds, 0 before the prompt."""
        return len(self.layers[0].slots.length_B)

    @property
    def sizes(self) -> tuple[tuple[torch.Size, int], ...]:
        """Of each layer, what a program may have to be looked at again for: see `LayerCache.sizes`."""
        return tuple(layer.slots.sizes for layer in self.layers)

    @outside_inference
    def begin_step(self, rows: int) -> bool:
        """Count one more token of every row, and return whether one of them opens a page.

        Raises
        ------
        CacheStateError
            If it holds no prompt or another number of rows, is closed, or a step was interrupted.
        """
        self.binding.check_open()
        self._check_rows(rows)
        self._check_complete()
        if rows != self.rows:
            raise CacheStateError(f"the cache holds {self.rows} rows and was given {rows}")
        opens = False
        for layer in self.layers:
            layer.pending = True
            opens |= layer.slots.begin_step() is not None
        return opens

    def end_step(self) -> None:
        """Say that the step that has begun is complete."""
        for layer in self.layers:
            layer.pending = False
            layer.columns += 1

    # Continuous batching ------------------------------------------------------------------------------------

    def fresh(self) -> PagedCache:
        """Make an empty cache of the same model, policy, budget and format."""
        return PagedCache(
            self.binding.model, self.policy, self.budget, kv_dtype=self.kv_dtype, fused=self._fused
        )

    @outside_inference
    def adopt(self, row: int, other: PagedCache) -> None:
        """Make a row what the only row of another cache is; the number of rows as `row` adds one.

        Afterwards rows may have seen different numbers of tokens, so the model must be given `position_ids`.

        Raises
        ------
        CacheStateError
            If the other cache has another policy, budget or format, or not exactly one row.
        """
        if (other.policy, other.budget, other.kv_dtype) != (self.policy, self.budget, self.kv_dtype):
            raise CacheStateError("adopt needs a cache of the same policy and budget, in the same format")
        for layer, theirs in zip(self.layers, other.layers, strict=True):
            layer.slots.adopt(row, theirs.slots)

    @outside_inference
    def keep_rows(self, rows: list[int]) -> None:
        """Keep only the given rows, and no more slots than they need."""
        for layer in self.layers:
            layer.slots.select_rows(torch.tensor(rows))
            layer.slots.release()

    # What it holds ------------------------------------------------------------------------------------------

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, all layers."""
        return sum(layer.slots.kv_bytes for layer in self.layers)

    @property
    def metadata_bytes(self) -> int:
        """Bytes allocated for positions, representatives and stamps, all layers."""
        return sum(layer.slots.metadata_bytes for layer in self.layers)

    @property
    def dense_kv_bytes(self) -> int:
        """Bytes that keys and values of all tokens seen would take."""
        return sum(layer.slots.dense_kv_bytes for layer in self.layers)

    @property
    def num_evicted(self) -> int:
        """Tokens seen and no longer resident, summed over layers, rows and KV heads."""
        return sum(layer.slots.num_evicted for layer in self.layers)

    def row_dense_kv_bytes(self, row: int) -> int:
        """Bytes that keys and values of all tokens that a row has seen would take, all layers."""
        return sum(layer.slots.row_dense_kv_bytes(row) for layer in self.layers)

    def row_evicted(self, row: int) -> int:
        """Tokens that a row has seen and no longer holds, summed over layers and KV heads."""
        return sum(layer.slots.row_evicted(row) for layer in self.layers)

    def resident_positions(self, layer: int) -> list[list[list[int]]]:
        """Logical positions (padding not counted) that a layer holds: a sorted list per row and KV head."""
        return self.layers[layer].slots.resident_positions()

    def summary(self) -> dict[str, Any]:
        """Policy, budget and what is held, ready for JSON."""
        return {
            "policy": policy_to_dict(self.policy),
            "budget": None if self.budget is None else self.budget.budget,
            "decode_budget": None if self.budget is None else self.budget.decode_budget,
            "kv_dtype": self.kv_dtype,
            "columns": self.get_seq_length(),
            "kv_bytes": self.kv_bytes,
            "metadata_bytes": self.metadata_bytes,
            "dense_kv_bytes": self.dense_kv_bytes,
            "num_evicted": self.num_evicted,
        }


def make_cache(
    model: PreTrainedModel,
    *,
    policy: str | Policy = DEFAULT_POLICY,
    budget: int | None = None,
    decode_budget: int | None = None,
    batch_size: int | None = None,
    kv_dtype: str | None = None,
) -> PagedCache:
    """Cache for ``model.generate(..., past_key_values=cache)``, for any number of turns.

    What it cannot serve it refuses when the model is called. Of one thing a cache is told nothing: with
    ``guidance_scale`` the library reads a second text in a cache of its own, which nothing bounds. Only `generate`
    can refuse that.

    Parameters
    ----------
    model
        A decoder-only transformers model with full attention.
    policy
        A policy, its name, or a text such as ``raas:r=0.25``.
    budget, decode_budget
        Tokens to keep in each layer and row: prompt included, or on top of the prompt. Exactly one of the two,
        and none for ``dense``.
    batch_size
        Rows that the cache is meant for; None takes any number.
    kv_dtype
        Format that keys and values are kept in: ``bfloat16``, ``float16`` or ``float32``; None for the model's own.
        Half the bytes for a float32 model; what it saves in time depends on the processor.

    Raises
    ------
    UnsupportedModelError
        If the model would be served wrongly.
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
    return PagedCache(model, policy, policy_budget(policy, budget, decode_budget), batch_size, kv_dtype)
