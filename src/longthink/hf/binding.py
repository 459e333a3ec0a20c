"""`ModelBinding`: a cache belongs to one model, whose attention function is replaced while the cache is open."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from transformers import PreTrainedModel

from longthink.errors import CacheStateError, UnsupportedFeatureError
from longthink.hf.attention import IMPLEMENTATION, install, uninstall
from longthink.hf.guard import CacheUse, note_use, unwatch, watch

hides_use_cache: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
"""Models that tell their attention use_cache=False whatever they are called with (NanoChat): see `self_check`."""

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function create ordinary tensors even under `torch.inference_mode`.

    Inference tensors cannot be written to outside of it, so a cache filled there could not be used any further.
    """

    @functools.wraps(function)
    def ordinary(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return ordinary


class ModelBinding:
    """Binds a cache to one model, which it does not keep alive; `first_layer` is the first that has pages."""

    def __init__(self, model: PreTrainedModel, limit: int | None = None, first_layer: int = 0) -> None:
        self.use = CacheUse(limit)
        self._first_layer = first_layer
        self._model = weakref.ref(model)
        self._closer: weakref.finalize | None = None  # type: ignore[type-arg]
        self._modules: frozenset[int] = frozenset()
        self.accepts_no_use_cache = False
        self.saw_no_use_cache = False

    def copy_for(self, model: PreTrainedModel) -> ModelBinding:
        """Binding of a copy of the cache, which is not open."""
        other = ModelBinding(model, self.use.limit, self._first_layer)
        other.use.used = self.use.used
        return other

    @property
    def model(self) -> PreTrainedModel:
        """The model; `CacheStateError` if it has been deleted."""
        model = self._model()
        if model is None:
            raise CacheStateError("the model of this cache has been deleted")
        return model

    @property
    def is_open(self) -> bool:
        """Whether `open` has been called, and not `close` since."""
        return self._closer is not None and self._closer.alive

    def open(self, cache: object) -> None:
        """Route the model's attention through the cache until `close`, or until the cache is garbage-collected."""
        model = self.model
        # If another attention implementation was set in the meantime, opening again replaces it.
        if self.is_open and model.config._attn_implementation == IMPLEMENTATION:
            return
        self.close()
        install(model)
        watch(model, self.use, self._first_layer)
        self._closer = weakref.finalize(cache, _close, self._model, self.use)

    def close(self) -> None:
        """Restore the model's own attention implementation."""
        if self._closer is not None:
            self._closer()

    def check_open(self) -> None:
        """Raise unless the model exists, its attention goes through its caches, and its layers use them."""
        model = self._model()
        if not self.is_open or model is None or model.config._attn_implementation != IMPLEMENTATION:
            raise CacheStateError(
                "this cache is closed, or the model's attention implementation was changed: call cache.open(), "
                "or use it in a `with cache:` block"
            )
        if model.training and any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
            raise UnsupportedFeatureError(
                f"{type(model).__name__} is in training mode with gradient checkpointing, which bypasses the cache: "
                "call model.eval() to generate"
            )

    def add_use(self, rows: int, columns: int) -> None:
        """Note that the cache was given keys, and now holds so many columns of text."""
        note_use(self._model(), self.use, rows, columns)

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise `CacheStateError` unless the cache is for this model."""
        own = self._model()
        if own is not model:
            name = "deleted" if own is None else f"another {type(own).__name__}"
            raise CacheStateError(
                f"this cache is for another model ({name}): create one for this {type(model).__name__} with "
                "make_cache(model, ...)"
            )

    def check_use_cache(self, use_cache: bool | None, *, again: bool) -> None:
        """Raise `UnsupportedFeatureError` if the caller wants no cache: the whole text would come in every step.

        In models that do not pass on what the caller says, `again` decides: more comes than has come so far.
        """
        if use_cache is not False:
            return
        self.saw_no_use_cache = True
        if again or not (self.accepts_no_use_cache or self.model in hides_use_cache):
            raise UnsupportedFeatureError(
                "use_cache=False cannot be used with a longthink cache: pass use_cache=True (it may come from "
                "model.generation_config or model.config)"
            )

    def check_module(self, module: Any) -> None:
        """Raise `CacheStateError` unless the attention module is part of the model."""
        if id(module) in self._modules:
            return
        # Adapters may have inserted modules since the last check.
        self._modules = frozenset(map(id, self.model.modules()))
        if id(module) not in self._modules:
            raise CacheStateError(
                f"this cache is for another model: {type(module).__name__} is not part of its "
                f"{type(self.model).__name__}"
            )


def _close(model: weakref.ref[PreTrainedModel], use: CacheUse) -> None:
    uninstall(model)
    unwatch(model, use)
