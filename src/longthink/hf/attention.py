"""Attention of Hugging Face models over a `PagedCache`, switched on per model and off again.

A cache layer's `update` gets no query, and an attention function gets no cache: `update` marks the key tensor
with its layer, and the attention function finds the layer there. Nothing global is written, so threads and
nested calls cannot mix up their caches.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch
from packaging.version import Version
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from longthink.errors import UnsupportedFeatureError, UnsupportedModelError

IMPLEMENTATION = "longthink"
_MARK = "_longthink_layer"


class AttentionLayer(Protocol):
    """What `update` leaves on the keys: a cache layer that computes its own attention."""

    def check_call(self, module: torch.nn.Module, dropout: float, use_cache: bool | None) -> None:
        """Raise if this module, or the way it is called, would make the layer give something wrong."""
        ...

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float | None
    ) -> Tensor:
        """Attention output of the new tokens, B x H x Q x D."""
        ...


def mark(key: Tensor, layer: AttentionLayer) -> Tensor:
    """View of the keys that carries the layer to the attention function."""
    key = key.view_as(key)
    setattr(key, _MARK, layer)
    return key


def longthink_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for `AttentionInterface`; with any other cache it is the library's SDPA."""
    layer: AttentionLayer | None = getattr(key, _MARK, None)
    if layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} asks for {name}: such layers are not supported"
            )
    layer.check_call(module, dropout, kwargs.get("use_cache"))
    valid = _valid_columns(attention_mask, query.shape[2])
    out = layer.attend(query, key, value, valid, scaling)
    return out.transpose(1, 2).contiguous(), None


def _valid_columns(mask: Tensor | None, columns: int) -> Tensor | None:
    """Which of the new tokens are real, B x Q, from the block mask that the library made."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape[-2:] != (columns, columns) or mask.shape[1] != 1:
        raise UnsupportedFeatureError(
            f"attention mask of shape {tuple(mask.shape)} and type {mask.dtype}: give the 2D padding mask instead"
        )
    valid = mask[:, 0, -1]
    causal = torch.ones(columns, columns, dtype=torch.bool, device=mask.device).tril()
    if columns > 1 and not torch.equal(mask[:, 0], causal & valid[:, None]):
        raise UnsupportedFeatureError("the attention mask is more than causal with padding: not supported")
    return valid


AttentionInterface.register(IMPLEMENTATION, longthink_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


class _Ours(str):
    """The name of our implementation, as it stands in a model's config; a copy of it is what stood there before.

    So a copy of the model, which no cache is open for, has the attention that the caller gave the model.
    """

    previous: str

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return self.previous

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.previous,)


_REMEMBERS = Version(torch.__version__) >= Version("2.13")
"""The compiler of older versions takes no subclass of `str` for a constant. There a copy that is made of a model
while a cache is open goes on under our name, which is the library's SDPA for every cache but ours."""


class _Installed:
    """The attention implementation that a model had, and how many open caches replaced it."""

    def __init__(self) -> None:
        self.previous: str | dict[str, Any] | None = None
        self.users = 0


_installed: weakref.WeakKeyDictionary[PreTrainedModel, _Installed] = weakref.WeakKeyDictionary()


# Reentrant: a cache that the garbage collector closes may do so in the middle of an `install` of the same thread.
_lock = threading.RLock()


def install(model: PreTrainedModel) -> None:
    """Let the model attend over paged caches, until `uninstall` was called as often as `install`."""
    with _lock:
        installed = _installed.setdefault(model, _Installed())
        if model.config._attn_implementation != IMPLEMENTATION:
            installed.previous = _implementations(model.config)
            model.set_attn_implementation(IMPLEMENTATION)
            if _REMEMBERS:
                _name_previous(model.config, installed.previous)
        installed.users += 1


def uninstall(model_ref: weakref.ref[PreTrainedModel]) -> None:
    """Take one `install` back; the last one gives the model the attention implementation that it had.

    If somebody has given it another one meanwhile, that one stays.
    """
    model = model_ref()
    with _lock:
        if model is None or model not in _installed:
            return
        installed = _installed[model]
        installed.users -= 1
        if installed.users == 0:
            del _installed[model]
            if model.config._attn_implementation == IMPLEMENTATION:
                model.set_attn_implementation(installed.previous)


def _implementations(config: PreTrainedConfig) -> str | dict[str, Any]:
    """What `set_attn_implementation` takes to give a model all implementations that it has now."""
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    own: str = config._attn_implementation
    return {"": own, **{name: _implementations(part) for name, part in parts.items()}} if parts else own


def _name_previous(config: PreTrainedConfig, previous: str | dict[str, Any]) -> None:
    """Let the name of our implementation remember what stood in its place."""
    parts = previous if isinstance(previous, dict) else {"": previous}
    if config._attn_implementation == IMPLEMENTATION:
        name = _Ours(IMPLEMENTATION)
        name.previous = parts[""]
        # The property would write to the configs of all parts.
        config._attn_implementation_internal = name
    for part in parts.keys() - {""}:
        _name_previous(getattr(config, part), parts[part])
