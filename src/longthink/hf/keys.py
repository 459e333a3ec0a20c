"""The keys that a model attends to, read in one pass over texts of one token.

Shape suffixes: B texts, K KV heads, D head dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longthink.hf.attention import install, uninstall
from longthink.hf.layer_kinds import has_pages, library_layers
from longthink.hf.placement import device_of
from longthink.hf.probe import undisturbed
from longthink.hf.standin import mixed_cache
from longthink.kernels import LogitRule, block_attention


class _Reader:
    """Attends to a text of one token, and keeps its key."""

    expands = False
    window_size: int | None = None
    key_BKQD: Tensor | None = None

    def check_call(self, module: nn.Module, dropout: float, options: Mapping[str, Any]) -> None:
        """Accept everything: nothing is kept of the text."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float | None,
        rule: LogitRule, seen: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return the attention output, B x H x 1 x D of the values."""
        self.key_BKQD = key
        return block_attention(query, key, value, None, scaling or query.shape[-1] ** -0.5, rule)

    def attend_again(self, query: Tensor, scaling: float | None, rule: LogitRule) -> Tensor:
        """Return anything of the right shape: what other layers make of the key is of no interest."""
        return query


def read_keys(model: PreTrainedModel, token_B1: Tensor, position_B1: Tensor) -> dict[int, Tensor]:
    """Keys of these tokens at these positions (BKD) by layer: those with full attention that can be replaced."""
    layers = library_layers(model.config)
    readers = {i: _Reader() for i, layer in enumerate(layers) if has_pages(layer)}
    with undisturbed(model):
        install(model)
        try:
            cache = mixed_cache(layers, readers)
            model(token_B1, position_ids=position_B1, past_key_values=cache, use_cache=True)
        finally:
            uninstall(weakref.ref(model))
    return {i: key[:, :, 0] for i, reader in readers.items() if (key := reader.key_BKQD) is not None}


_replaceable: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
"""Models that were tried."""


def attention_is_replaceable(model: PreTrainedModel) -> bool:
    """Whether the model lets transformers replace the attention of all layers that have full attention.

    Some do and do not say so (Qwen3-Next), so those that do not say so are tried.
    """
    if model._supports_attention_backend:
        return True
    if model not in _replaceable:
        token = torch.zeros(1, 1, dtype=torch.int64, device=device_of(model))
        try:
            found = read_keys(model, token, token)
        except Exception:
            found = {}
        _replaceable[model] = len(found) == sum(map(has_pages, library_layers(model.config)))
    return _replaceable[model]
