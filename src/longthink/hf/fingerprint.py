"""What identifies the model of a saved cache: what its configuration says of keys, and a hash of its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from longthink.hf.layer_kinds import has_pages, library_layers

_SAMPLED = 256
"""Values of each parameter that are hashed, evenly spaced, the first and the last among them."""


def model_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Fields that must agree between the model that filled a cache and the one that reads it, ready for JSON.

    The hash covers names, shapes, dtypes and up to 256 values of each parameter. Another checkpoint, further
    training, quantisation or a merged adapter changes it; an edit of single weights between the sampled ones, or
    another active adapter among those loaded, does not.
    """
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None)
    return {
        "class": type(model).__name__,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(_bounded_layer(model), "num_key_value_heads", None) or heads,
        "head_dim": head_dim(model),
        "vocabulary": config.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rope": json.dumps(rope, sort_keys=True, default=str),
        "weights": _hash_weights(model),
    }


def head_dim(model: PreTrainedModel) -> int:
    """Features of a key in the layers with full attention."""
    config = _bounded_layer(model)
    found: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return found


def _bounded_layer(model: PreTrainedModel) -> PreTrainedConfig:
    """What the configuration says of the first layer with full attention, where layers differ."""
    config = model.config.get_text_config(decoder=True)
    own = getattr(config, "per_layer_config", None)
    if not own:
        return config
    return own[next(i for i, layer in enumerate(library_layers(model.config)) if has_pages(layer))]


def _hash_weights(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        # The values of an offloaded parameter are not at hand.
        if parameter.numel() and not parameter.is_meta:
            digest.update(_sample(parameter.detach()))
    return digest.hexdigest()


def _sample(tensor: torch.Tensor) -> bytes:
    """Bytes of evenly spaced values. A transposed tensor is indexed, as flattening would copy all of it."""
    count = min(_SAMPLED, tensor.numel())
    steps = [i * (tensor.numel() - 1) // max(count - 1, 1) for i in range(count)]
    index = torch.tensor(steps, device=tensor.device)
    values = tensor[torch.unravel_index(index, tensor.shape)] if tensor.ndim else tensor.reshape(1)
    return values.contiguous().view(torch.uint8).cpu().numpy().tobytes()
