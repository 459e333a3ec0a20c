"""The general guard: a text that was not decoded through the cache, or not within its bound, is reported by name.

Two mistakes, whatever leads to them. A cache is open and the model runs with another one, or with none: while a cache
is open, our attention function sees those calls too. And a run ends in which the cache did not take in every token,
or kept more than its bound.

What is not seen: calls of a model that another library compiled, and what happens while no cache is open.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, UnbatchedClassifierFreeGuidanceLogitsProcessor

from longthink.cache import LayerCache
from longthink.errors import (
    CacheStateError,
    CacheUnusedWarning,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from longthink.hf.refusals import refusal
from longthink.policies import grows

if TYPE_CHECKING:
    from longthink.hf.cache import PagedCache

_FEWEST_STEPS = 16
"""Steps with another cache that count as decoding; a few may be a test or a comparison."""


_NOT_THE_CALLER = ("longthink", "transformers", "torch", "weakref")
"""Packages that a warning is not attributed to."""

_GUIDANCE = UnbatchedClassifierFreeGuidanceLogitsProcessor.__call__.__code__


class CacheUse:
    """What a cache has been used for, and what the model has done without it since.

    Attributes
    ----------
    used
        Whether the cache has been given tokens, or is not meant to be.
    limit
        Columns of text up to which the model can be served; None for any number.
    asked
        Whether the cache was asked for its length since it was used last, as the library does before a pass.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.used = False
        self.limit = limit
        self.asked = False
        self._rows = self._columns = 0
        self.ignore()

    def ignore(self) -> None:
        """Forget what the model has done without the cache."""
        self._steps = self._last = 0
        self._follows = False

    def add(self, rows: int, columns: int) -> None:
        """Note that the cache was given keys, and now holds so many columns of text."""
        self.used, self.asked, self._rows, self._columns = True, False, rows, columns
        self.ignore()

    def pass_over(self) -> None:
        """Note a step with another longthink cache, such as a copy: it counts if the library was given this one."""
        if self.asked and not self.used:
            self._steps += 1

    def add_foreign(self, rows: int, new: int, columns: int) -> None:
        """Note a pass of the model without the cache: over `new` columns, which read `columns`."""
        if not self._last:
            if self.used and (scale := _guidance_scale()) is not None:
                raise refusal("guidance_scale", scale)
            # The next step of the text in this cache: its last token alone, or all of it again.
            self._follows = self.used and rows == self._rows and columns in (self._columns + 1, 1)
        if self.limit is not None and columns > self.limit and (self._follows or self.asked):
            self.ignore()
            self.check_limit(columns)
        if new == 1 or columns == self._last + 1:
            self._steps += 1
        self._last = columns
        if self._follows and self._steps == _FEWEST_STEPS:
            _warn(
                f"after {self._columns} columns of text in a longthink cache, the model went on with another cache, "
                "which is not bounded: a text of the same length, or a single token. If that is another text, close "
                "the longthink cache before"
            )

    def check_limit(self, columns: int) -> None:
        """Raise `UnsupportedModelError` if the model cannot be served over so many columns of text."""
        check_limit(self.limit, columns)

    def finish(self) -> None:
        """Warn if the cache was never given a token and the model decoded without it."""
        if not self.used and self._steps >= _FEWEST_STEPS:
            _warn(
                f"a longthink cache was open and was never given a token, while the model decoded {self._steps} "
                "tokens with another cache or with none, outside of its bound: pass past_key_values=cache"
            )
        self.ignore()


def check_limit(limit: int | None, columns: int) -> None:
    """Raise `UnsupportedModelError` if a text is too long: see `longthink.hf.support.text_limit`."""
    if limit is not None and columns > limit:
        raise UnsupportedModelError(
            f"{columns} tokens of text are too many for this model: beyond {limit} tokens "
            "(original_max_position_embeddings) it rotates all keys in another way, or transformers drops the cache "
            "and goes on without a bound; longthink serves it up to there"
        )


def check_new(new: int, held: int) -> None:
    """Raise `ValueError` unless a prompt has columns behind those held: transformers leaves off so many of it."""
    if new <= 0:
        raise ValueError(
            f"the prompt has no token behind the {held} columns that the cache holds: pass the text in the cache and "
            "the new tokens behind it; for another text, call cache.reset() or create a new cache"
        )


def check_mask_columns(given: int, held: int, new: int) -> None:
    """Raise `UnsupportedFeatureError` unless a mask covers the text in the cache and the new tokens."""
    if given != held + new:
        raise UnsupportedFeatureError(
            f"attention_mask has {given} columns, and must cover the {held} in the cache and the {new} new ones; the "
            "last token of an answer is not in the cache: it comes with the next turn"
        )


def _warn(message: str) -> None:
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals["__name__"].split(".")[0] in _NOT_THE_CALLER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, CacheUnusedWarning, stacklevel=level)


def _guidance_scale() -> float | None:
    """The scale if transformers' guidance runs the model: nothing that it gives to a cache tells of it."""
    frame: FrameType | None = sys._getframe(0)
    while frame is not None and frame.f_code is not _GUIDANCE:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"].guidance_scale


# Open caches ----------------------------------------------------------------------------------------------------


class _Watched:
    """The open caches of a model, and its first layer with pages: one call there for each pass."""

    def __init__(self, model: PreTrainedModel, first_layer: int) -> None:
        first = (part for part in model.modules() if getattr(part, "layer_idx", None) == first_layer)
        self.first_layer = frozenset(id(part) for part in first if getattr(part, "is_causal", True))
        self.uses: list[CacheUse] = []


_watched: weakref.WeakKeyDictionary[PreTrainedModel, _Watched] = weakref.WeakKeyDictionary()


def watch(model: PreTrainedModel, use: CacheUse, first_layer: int) -> None:
    """Watch what the model does without a cache that was opened."""
    _watched.setdefault(model, _Watched(model, first_layer)).uses.append(use)


def note_use(model: PreTrainedModel | None, use: CacheUse, rows: int, columns: int) -> None:
    """Note that a cache was given keys, see `CacheUse.add`, and that the model's other open caches were not."""
    use.add(rows, columns)
    watched = None if model is None else _watched.get(model)
    for other in list(watched.uses) if watched is not None else ():
        if other is not use:
            other.pass_over()


def unwatch(model_ref: weakref.ref[PreTrainedModel], use: CacheUse) -> None:
    """Stop watching, and warn if the cache was not used but should have been."""
    model = model_ref()
    watched = None if model is None else _watched.get(model)
    if model is not None and watched is not None and use in watched.uses:
        watched.uses.remove(use)
        if not watched.uses:
            del _watched[model]
    use.finish()


def notice(module: torch.nn.Module, query: Tensor, key: Tensor) -> None:
    """Note attention, BHQD over BKND, that goes through none of our caches."""
    if torch.compiler.is_compiling():
        return
    for watched in list(_watched.values()):
        if id(module) in watched.first_layer:
            for use in list(watched.uses):
                use.add_foreign(len(query), query.shape[2], key.shape[2])


# The end of a run -----------------------------------------------------------------------------------------------


def check_run(cache: PagedCache, columns: int) -> None:
    """Raise `CacheStateError` unless the cache has taken in so many columns, and kept no more than its bound."""
    if cache.columns < columns:
        raise CacheStateError(
            f"the model did not use the cache: it read {columns} columns of text, of which the cache was given "
            f"{cache.columns}; the rest went to another cache, without a bound, and the output is not to be trusted"
        )
    check_bound(cache)


def check_bound(cache: PagedCache) -> None:
    """Raise `CacheStateError` if a layer has not taken in all tokens counted, or keeps more than its bound."""
    for layer in cache.paged:
        if layer.slots.rows.lengths and (fault := _fault(layer.slots)):
            raise CacheStateError(
                f"layer {layer.index} of the cache {fault}: the output is not to be trusted"
            )


def _fault(slots: LayerCache) -> str | None:
    table, page_size = slots.store.table, slots.policy.page_size
    lengths = slots.rows.lengths
    if (taken := table.now_B.tolist()) != lengths:
        return (
            f"was not used in all steps: its rows have {lengths} tokens, and {taken} of them were attended to"
        )
    if grows(slots.policy):
        return None
    resident_B = table.resident_BKS.sum(-1).amax(-1).tolist()
    for row, (length, cap, resident) in enumerate(zip(lengths, slots.rows.caps, resident_B, strict=True)):
        bound = cap * page_size
        if resident > bound or (length > bound and not slots.row_evicted(row)):
            return f"keeps {resident} of {length} tokens in row {row}, beyond its bound of {bound}"
    return None


def output_columns(output: Any, input_ids: Tensor | None, prompt: Tensor | None) -> int:
    """Columns that the model must have read to generate this output: all but the last token.

    Parameters
    ----------
    output
        What ``model.generate`` returned.
    input_ids
        Tokens with which the output begins; None if it has none.
    prompt
        What was read as the prompt: tokens or embeddings.
    """
    sequences = output if isinstance(output, Tensor) else output.sequences
    new = sequences.shape[1] - (0 if input_ids is None else input_ids.shape[1])
    return int((0 if prompt is None else prompt.shape[1]) + new - 1)
