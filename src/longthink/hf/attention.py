"""The attention function of models that use a `PagedCache`, installed per model and removed again.

A cache layer's `update` does not see the query, and an attention function does not see the cache. So `update`
attaches the layer to the key tensor, where the attention function finds it. There is no global state: threads and
nested calls cannot mix up their caches.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from packaging.version import Version
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from longthink import kernels
from longthink.errors import UnsupportedFeatureError, UnsupportedModelError
from longthink.hf.guard import check_mask_columns, notice
from longthink.kernels import LogitRule

IMPLEMENTATION = "longthink"
_MARK = "_longthink_layer"
_SEEN = "_longthink_seen"
_VALUE = "_longthink_value"
_SECOND = "_longthink_second"
_FOREIGN = ("sliding_window", "position_bias", "indices", "block_indices", "sinks")
"""Arguments of attention functions that change what is attended to, or how: none is known to a layer of ours, but
for the window of a layer that has it."""
_DIFFERENTIAL = "DiffLlamaAttention"
"""Attends twice with the same queries and keys: to the first half of the values, by KV heads, and to the second."""


class AttentionLayer(Protocol):
    """What `update` attaches to the keys: a cache layer that computes its own attention."""

    expands: bool
    """Whether the model attends to other keys than those it gave to `update`."""
    window_size: int | None
    """Columns that a query reads at most, its own included; None for all of the text."""

    def check_call(self, module: torch.nn.Module, dropout: float, options: Mapping[str, Any]) -> None:
        """Raise if the output would be wrong for this module or these arguments, such as the caller's `use_cache`."""
        ...

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        scaling: float | None,
        rule: LogitRule,
        seen: Tensor | None,
    ) -> Tensor:
        """Append the new tokens and return their attention output, B x H x Q x D of the values.

        `valid` is False for new columns that are padding, B x Q; `seen` likewise for the columns before, B x N, and
        None where the mask does not say.
        """
        ...

    def attend_again(self, query: Tensor, scaling: float | None, rule: LogitRule) -> Tensor:
        """Return the attention output of a layer that shares what the last call of `attend` has read."""
        ...


class _Handover(threading.local):
    """The layer whose keys were returned last in this thread, and its index in the model."""

    layer: AttentionLayer | None = None
    index = -1


_handover = _Handover()


def mark(key: Tensor, value: Tensor, layer: AttentionLayer, index: int) -> Tensor:
    """Return a view of the keys with the layer, and the values as `update` was given them, attached.

    Some models compute other keys from those that `update` returns (MLA expands them, JetMoE repeats them), and
    attend to these: then the layer is found by its index, in the next attention of the thread.
    """
    key = key.view_as(key)
    setattr(key, _MARK, layer)
    setattr(key, _VALUE, value)
    if not torch.compiler.is_compiling():
        _handover.layer, _handover.index = layer, index
    return key


def _layer_of(module: torch.nn.Module, key: Tensor) -> AttentionLayer | None:
    """The layer that takes these keys; None if they go through no cache of ours."""
    layer: AttentionLayer | None = getattr(key, _MARK, None)
    if torch.compiler.is_compiling():
        return layer
    if layer is None and getattr(module, "layer_idx", None) == _handover.index:
        layer = _handover.layer
        if layer is not None:
            layer.expands = True
    _handover.layer = None
    return layer


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
    """Attention function for `AttentionInterface`; where keys are not of a `PagedCache`, it is transformers' SDPA."""
    layer = _layer_of(module, key)
    rule = LogitRule(kwargs.get("softcap"), kwargs.get("s_aux"))
    if layer is not None and getattr(module, "is_kv_shared_layer", False):
        return layer.attend_again(query, scaling, rule).transpose(1, 2).contiguous(), None
    if layer is None:
        notice(module, query, key)
        if not rule.is_plain and not dropout:
            return _native_attention(query, key, value, attention_mask, scaling, rule), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    differential = type(module).__name__ == _DIFFERENTIAL
    if differential:
        if (second := getattr(key, _SECOND, None)) is not None:
            return second.transpose(1, 2).contiguous(), None
        value = _side_by_side(getattr(key, _VALUE))
    for name in _FOREIGN:
        given = kwargs.get(name)
        if given is not None and (name != "sliding_window" or given != layer.window_size):
            raise UnsupportedModelError(f"{type(module).__name__} uses {name}: such layers are not supported")
    layer.check_call(module, dropout, kwargs)
    if rule.sink_H is not None:
        rule = rule._replace(sink_H=rule.sink_H.detach())
    # A window knows its own mask.
    valid = _valid_columns(attention_mask, query.shape[2]) if layer.window_size is None else None
    out = layer.attend(query, key, value, valid, scaling, rule, getattr(attention_mask, _SEEN, None))
    if differential:
        out, second = out.chunk(2, -1)
        setattr(key, _SECOND, second)
    return out.transpose(1, 2).contiguous(), None


def _side_by_side(value: Tensor) -> Tensor:
    """The values of both calls of a differential attention, for every KV head: the weights are the same."""
    return torch.cat([half.repeat(1, 2, 1, 1) for half in value.chunk(2, 1)], -1)


def _native_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, rule: LogitRule
) -> Tensor:
    """Attention with a rule that SDPA does not know, over keys that are in no cache of ours."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if mask is None:
        shape = query.shape[2], key.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])[None, None]
    elif mask.dtype != torch.bool:
        raise UnsupportedFeatureError(
            f"attention mask of type {mask.dtype}: pass the 2D padding mask instead, while a longthink cache is open"
        )
    return kernels.block_attention(query, key, value, mask, scaling, rule).transpose(1, 2).contiguous()


def _valid_columns(mask: Tensor | None, columns: int) -> Tensor | None:
    """Which of the new tokens are real, B x Q, from the block mask that transformers made."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape[-2:] != (columns, columns) or mask.shape[1] != 1:
        raise UnsupportedFeatureError(
            f"attention mask of shape {tuple(mask.shape)} and type {mask.dtype}: pass the 2D padding mask instead"
        )
    valid = mask[:, 0, -1]
    causal = torch.ones(columns, columns, dtype=torch.bool, device=mask.device).tril()
    if columns > 1 and not torch.equal(mask[:, 0], causal & valid[:, None]):
        raise UnsupportedFeatureError("the attention mask is more than causal with padding: not supported")
    return valid


def longthink_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Mask function for `AttentionMaskInterface`: transformers' own, with what the 2D mask says of earlier columns.

    It covers the new columns (our caches ask for no others). In a later turn the rest of the 2D mask is attached.
    """
    seen = None
    if attention_mask is not None and isinstance(kv_offset, int) and kv_offset > 0:
        check_mask_columns(attention_mask.shape[1], kv_offset + kv_length - q_length, q_length)
        seen = attention_mask[:, :kv_offset]
        if q_length == 1 and (torch.compiler.is_compiling() or bool(seen.all())):
            seen = None  # a single token is compared only where the mask hides anything
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and seen is None, **kwargs,
    )  # fmt: skip
    if seen is not None and mask is not None:
        _attach_seen(mask, seen)
    return mask


@torch.compiler.disable
def _attach_seen(mask: Tensor, seen: Tensor) -> None:
    setattr(mask, _SEEN, seen)


AttentionInterface.register(IMPLEMENTATION, longthink_attention)
AttentionMaskInterface.register(IMPLEMENTATION, longthink_mask)


class _Name(str):
    """Our implementation's name in a model's config; a copy of it is the name that it replaced.

    So a copy of the model, for which no cache is open, has the model's original attention.
    """

    previous: str

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return self.previous

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.previous,)


_COMPILES_NAME = Version(torch.__version__) >= Version("2.13")
"""Older compilers accept no subclass of `str` as a constant. There, a model copied while a cache is open keeps our
name, which means SDPA for every other cache."""


class _Installed:
    """A model's original attention implementation, and the number of open caches."""

    def __init__(self) -> None:
        self.previous: str | dict[str, Any] | None = None
        self.users = 0


_installed: weakref.WeakKeyDictionary[PreTrainedModel, _Installed] = weakref.WeakKeyDictionary()


# Reentrant: the garbage collector may close a cache in the middle of `install` in the same thread.
_lock = threading.RLock()


def install(model: PreTrainedModel) -> None:
    """Install the attention function, until `uninstall` has been called as often as `install`."""
    with _lock:
        installed = _installed.setdefault(model, _Installed())
        if model.config._attn_implementation != IMPLEMENTATION:
            installed.previous = _implementations(model.config)
            model.set_attn_implementation(IMPLEMENTATION)
            if _COMPILES_NAME:
                _keep_previous(model.config, installed.previous)
        installed.users += 1


def uninstall(model_ref: weakref.ref[PreTrainedModel]) -> None:
    """Undo one `install`; the last one restores the model's original attention implementation.

    An implementation that was set in the meantime stays.
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
    """Current implementations of all parts of a model, as an argument of `set_attn_implementation`."""
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    own: str = config._attn_implementation
    return {"": own, **{name: _implementations(part) for name, part in parts.items()}} if parts else own


def _keep_previous(config: PreTrainedConfig, previous: str | dict[str, Any]) -> None:
    parts = previous if isinstance(previous, dict) else {"": previous}
    if config._attn_implementation == IMPLEMENTATION:
        name = _Name(IMPLEMENTATION)
        name.previous = parts[""]
        # The property's setter would change the configs of all parts.
        config._attn_implementation_internal = name
    for part in parts.keys() - {""}:
        _keep_previous(getattr(config, part), parts[part])
