"""What ties a cache to its model: attention that is switched over, and the checks that it is this model that runs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from transformers import PreTrainedModel

from longthink.errors import CacheStateError, UnsupportedFeatureError
from longthink.hf.attention import IMPLEMENTATION, install, uninstall

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function make ordinary tensors under `torch.inference_mode` too.

    A tensor that is made there can never be written to outside, so a cache that was filled under it could not go on.
    """

    @functools.wraps(function)
    def ordinary(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return ordinary


def check_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Refuse a model in training mode whose layers leave the cache out.

    Raises
    ------
    UnsupportedFeatureError
        If it is in training mode with gradient checkpointing.
    """
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise UnsupportedFeatureError(
            f"{type(model).__name__} is in training mode with gradient checkpointing, where its layers use no cache: "
            "call model.eval() to generate"
        )


class ModelBinding:
    """Ties a cache to one model. It knows the model but does not keep it alive.

    Parameters
    ----------
    model
        The model that the cache is for.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._closer: weakref.finalize | None = None  # type: ignore[type-arg]
        self._modules: frozenset[int] = frozenset()

    @property
    def model(self) -> PreTrainedModel:
        """The model.

        Raises
        ------
        CacheStateError
            If it is gone.
        """
        model = self._model()
        if model is None:
            raise CacheStateError("the model of this cache is gone")
        return model

    @property
    def is_open(self) -> bool:
        """Whether the model was made to attend over the cache, and nobody has closed it since."""
        return self._closer is not None and self._closer.alive

    def open(self, cache: object) -> None:
        """Let the model attend over the cache until `close`, or until the cache is collected."""
        model = self.model
        # After somebody has set another attention implementation, opening again means it.
        if self.is_open and model.config._attn_implementation == IMPLEMENTATION:
            return
        self.close()
        install(model)
        self._closer = weakref.finalize(cache, uninstall, self._model)

    def close(self) -> None:
        """Give the model its own attention implementation back."""
        if self._closer is not None:
            self._closer()

    def check_open(self) -> None:
        """Raise unless the model attends over its caches now.

        Raises
        ------
        CacheStateError
            If the cache is closed, its model gone, or the attention implementation another.
        UnsupportedFeatureError
            If the model's layers would leave the cache out.
        """
        model = self._model()
        if not self.is_open or model is None or model.config._attn_implementation != IMPLEMENTATION:
            raise CacheStateError(
                "this cache is closed, or the model's attention implementation was changed: call cache.open(), "
                "or use it in a `with cache:` block"
            )
        check_gradient_checkpointing(model)

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise `CacheStateError` unless the cache is for this model."""
        own = self._model()
        if own is not model:
            name = "one that is gone" if own is None else f"another {type(own).__name__}"
            raise CacheStateError(
                f"this cache is for another model ({name}): make one for this {type(model).__name__} with "
                "make_cache(model, ...)"
            )

    def check_module(self, module: Any) -> None:
        """Raise `CacheStateError` unless the module that attends is part of the model."""
        if id(module) in self._modules:
            return
        # Adapters may have put other modules in since the last look.
        self._modules = frozenset(map(id, self.model.modules()))
        if id(module) not in self._modules:
            raise CacheStateError(
                f"this cache is for another model: {type(module).__name__} is no part of its "
                f"{type(self.model).__name__}"
            )
