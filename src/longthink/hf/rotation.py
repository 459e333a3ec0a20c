"""How a model rotates its keys (RoPE), found out by running it: for policies that depend on it.

Every text of one token has the same hidden states wherever it stands, since it attends to itself only. So the keys of
all layers, at several positions, come from one short forward pass, and show layer by layer which rotation takes the
key of one position to that of another.

Shape suffixes: K KV heads, T texts, P positions, D head dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longthink.cache import Rotation
from longthink.errors import UnsupportedModelError
from longthink.hf.keys import read_keys
from longthink.hf.layer_kinds import has_pages, library_layers
from longthink.hf.placement import device_of
from longthink.hf.support import text_tokens
from longthink.policies.streaming_llm import rotate_keys

_POSITIONS = (0, 1, 7, 131, 1021)
"""Angles between them distinguish layouts and signs in high and in low frequencies."""
_TEXTS = 4
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class _Layer:
    """Rotation of one layer; the module is None where keys do not depend on positions (NoPE)."""

    head_dim: int
    module: nn.Module | None = None
    interleaved: bool = False
    reversed: bool = False

    def rotation(self) -> Rotation:
        """As `Rotation`, with the frequencies that the model has now."""
        half = self.head_dim // 2
        if self.module is None:
            return Rotation(torch.zeros(half))
        frequencies = self.module.inv_freq
        assert isinstance(frequencies, Tensor)
        pairs = len(frequencies)
        if self.reversed:
            frequencies = -frequencies
        padded = torch.cat([frequencies, frequencies.new_zeros(half - pairs)])
        if pairs == half and not self.interleaved:
            return Rotation(padded)
        first = torch.arange(pairs) * (2 if self.interleaved else 1)
        second = first + (1 if self.interleaved else pairs)
        rest = torch.arange(2 * pairs, self.head_dim)
        order = torch.cat([first, rest[: len(rest) // 2], second, rest[len(rest) // 2 :]])
        return Rotation(padded, order.to(frequencies.device))


_layers: weakref.WeakKeyDictionary[PreTrainedModel, dict[int, _Layer | str]] = weakref.WeakKeyDictionary()
"""Of each layer with pages its rotation, or why none fits."""


def rotations(model: PreTrainedModel, layers: list[int]) -> dict[int, Rotation]:
    """Rotations of the keys in these layers.

    Raises
    ------
    UnsupportedModelError
        If no known rotation describes the keys of a layer; the message names it.
    """
    known = _layers.get(model)
    if known is None:
        known = _layers[model] = _probe(model)
    found = {}
    for index in layers:
        layer = known[index]
        if isinstance(layer, str):
            raise UnsupportedModelError(
                f"a policy that depends on how keys carry positions cannot serve layer {index} of "
                f"{type(model).__name__}: {layer}; with streaming_llm use streaming_llm:positions=logical"
            )
        found[index] = layer.rotation()
    return found


def _probe(model: PreTrainedModel) -> dict[int, _Layer | str]:
    config = model.config.get_text_config(decoder=True)
    places = [i for i, layer in enumerate(library_layers(config)) if has_pages(layer)]
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return dict.fromkeys(
            places, "image tokens have three-dimensional positions, unlike slots of the cache"
        )
    rotary = [part for part in model.modules() if isinstance(getattr(part, "inv_freq", None), Tensor)]
    if any(getattr(part, "rope_type", "default") in _LENGTH_DEPENDENT_ROPE for part in rotary):
        return dict.fromkeys(places, "its RoPE frequencies depend on the length of the text")
    longest = getattr(config, "max_position_embeddings", None) or _POSITIONS[-1] + 1
    positions = [position for position in _POSITIONS if position < longest]
    try:
        keys = _keys(model, positions)
    except Exception as error:
        return dict.fromkeys(places, f"its keys cannot be read ({type(error).__name__}: {error})")
    return {i: _fit(key_PTKD, positions, rotary) for i, key_PTKD in keys.items()}


def _keys(model: PreTrainedModel, positions: list[int]) -> dict[int, Tensor]:
    """Keys of each layer with pages as its attention reads them, PTKD: of `_TEXTS` tokens at all positions."""
    tokens = text_tokens(model, _TEXTS).repeat(len(positions))[:, None]
    position = torch.tensor(positions, device=device_of(model)).repeat_interleave(_TEXTS)[:, None]
    keys = read_keys(model, tokens, position)
    return {i: key.unflatten(0, (len(positions), _TEXTS)) for i, key in keys.items()}


def _fit(key_PTKD: Tensor, positions: list[int], rotary: list[nn.Module]) -> _Layer | str:
    """The candidate that describes the keys best, or why none does."""
    if not key_PTKD.isfinite().all():
        return "its keys are not finite"
    errors = {layer: _error(key_PTKD, positions, layer) for layer in _candidates(key_PTKD.shape[-1], rotary)}
    best = min(errors, key=lambda layer: errors[layer])
    if errors[best] > _tolerance(key_PTKD.dtype):
        return f"no known form of RoPE describes its keys (the best one is off by {errors[best]:.1%})"
    return best


def _candidates(head_dim: int, rotary: list[nn.Module]) -> Iterator[_Layer]:
    yield _Layer(head_dim)
    for module in rotary:
        if 2 * len(module.inv_freq) <= head_dim:  # type: ignore[arg-type]
            for interleaved in (False, True):
                for backwards in (False, True):
                    yield _Layer(head_dim, module, interleaved, backwards)


def _error(key_PTKD: Tensor, positions: list[int], layer: _Layer) -> float:
    """Largest distance of a rotated key from the model's own, relative to the key's norm."""
    first_TKD, rotation = key_PTKD[0].float(), layer.rotation().to(key_PTKD.device)
    worst = 0.0
    for key_TKD, position in zip(key_PTKD.float(), positions, strict=True):
        shift = torch.full((len(first_TKD),), position - positions[0], device=key_PTKD.device)
        paired = rotation.paired(first_TKD)[:, :, None]
        rotated = rotation.unpaired(rotate_keys(paired, shift, rotation.inv_freq_D))[:, :, 0]
        distance = (rotated - key_TKD).norm(dim=-1) / first_TKD.norm(dim=-1).clamp(min=1e-12)
        worst = max(worst, distance.max().item())
    return worst


def _tolerance(dtype: torch.dtype) -> float:
    """Rounding of cosines, products and keys; a wrong layout is off by as much as the keys themselves."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)
