"""`PagedCache`: a transformers `Cache` of fixed page slots."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from longthink.accelerators import fused_steps
from longthink.cache import FusedStep, LayerCache
from longthink.config import DEFAULT_POLICY, KV_DTYPES, Budget, check_choice, check_int
from longthink.errors import CacheStateError, UnsupportedFeatureError
from longthink.hf.attention import IMPLEMENTATION, install, mark, uninstall
from longthink.hf.support import check_model, rope_frequencies
from longthink.policies import Policy, make_policy, policy_budget, policy_to_dict


class PagedLayer(CacheLayerMixin):
    """One layer of a `PagedCache`: a `LayerCache` behind the interface of the library.

    Two lengths must not be mixed up: `get_seq_length` counts columns of text (padding included, as everywhere in
    the library), while the slots hold at most the budget. Masks are asked for the new columns only.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, slots: LayerCache) -> None:
        super().__init__()
        self.slots = slots
        self.columns = 0
        self.pending = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: slots are allocated when the prompt's length is known."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys on, marked: they enter the cache in the attention function, beside their queries."""
        self.pending = True
        return mark(key_states, self), value_states

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float | None
    ) -> Tensor:
        """Take the new tokens in and return their attention output."""
        self.pending = False
        out = self.slots.attend(query, key, value, valid, scaling)
        self.columns += query.shape[2]
        self.is_initialized = True
        return out

    def get_seq_length(self) -> int:
        """Columns of text seen, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Size and offset of the mask: the new columns, behind those seen."""
        return query_length, self.columns

    def get_max_length(self) -> int:
        """No maximum: text may be longer than what is kept."""
        return -1

    def reset(self) -> None:
        """Forget everything and free the slots."""
        self.slots.reset()
        self.columns = 0
        self.pending = self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in another order, for beam search."""
        self.slots.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        self.slots.select_rows(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.slots.select_rows(torch.arange(len(self.slots.length_B)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what was overwritten cannot come back."""
        if tokens_to_remove:
            raise UnsupportedFeatureError(
                "a bounded page cache cannot be cropped: evicted tokens cannot come back"
            )


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
        self._model = weakref.ref(model)
        self._closer: weakref.finalize | None = None  # type: ignore[type-arg]
        frequencies = rope_frequencies(model)
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        dtype = None if kv_dtype is None else getattr(torch, kv_dtype)
        slots = [
            LayerCache(policy.for_layer(i), budget, inv_freq_D=frequencies, kv_dtype=dtype, fused=self._fused)
            for i in range(count)
        ]
        super().__init__(layers=[PagedLayer(layer) for layer in slots])
        self.open()

    # Opening and closing ------------------------------------------------------------------------------------

    def open(self) -> Self:
        """Let the model attend over this cache (done by the constructor; needed again after `close`)."""
        model = self._model()
        if model is None:
            raise CacheStateError("the model of this cache is gone")
        if self._closer is None or not self._closer.alive:
            install(model)
            self._closer = weakref.finalize(self, uninstall, self._model)
        return self

    def close(self) -> None:
        """Give the model its own attention implementation back; the contents stay."""
        if self._closer is not None:
            self._closer()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def expect_prompt(self, columns: int) -> Iterator[None]:
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
            layer.slots.expect_prompt(columns)
        try:
            yield
        finally:
            if any(layer.slots.awaits_prompt for layer in self.layers):
                self.reset()

    # The library's interface --------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in the new keys and values of a layer.

        Raises
        ------
        CacheStateError
            If the cache is closed, a step was interrupted, or the number of rows is not the one asked for.
        """
        if layer_idx == 0:
            self._check_state(len(key_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_state(self, rows: int) -> None:
        model = self._model()
        closed = self._closer is None or not self._closer.alive
        if closed or model is None or model.config._attn_implementation != IMPLEMENTATION:
            raise CacheStateError(
                "this cache is closed, or the model's attention implementation was changed: call cache.open(), "
                "or use it in a `with cache:` block"
            )
        if self._rows is not None and rows != self._rows:
            raise CacheStateError(f"the cache was made for batch_size={self._rows} and was given {rows} rows")
        if any(layer.pending or layer.columns != self.layers[0].columns for layer in self.layers):
            raise CacheStateError(
                "a step on this cache was interrupted: call cache.reset() or make a new one"
            )

    def activate_past_recording(self) -> None:
        """Refuse: asked for by assisted decoding, which takes tokens back."""
        raise UnsupportedFeatureError(
            "assisted decoding takes tokens back, and evicted tokens cannot come back: generate without assistant "
            "model and prompt lookup, or use transformers' own cache"
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

    def begin_step(self, rows: int) -> bool:
        """Count one more token of every row, and return whether one of them opens a page.

        Raises
        ------
        CacheStateError
            If it holds no prompt or another number of rows, is closed, or a step was interrupted.
        """
        self._check_state(rows)
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
        model = self._model()
        if model is None:
            raise CacheStateError("the model of this cache is gone")
        return PagedCache(model, self.policy, self.budget, kv_dtype=self.kv_dtype, fused=self._fused)

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
