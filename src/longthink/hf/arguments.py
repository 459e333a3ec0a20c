"""The forms in which `generate` accepts a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longthink.config import brief_repr

Tokens = Tensor | Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Any]
"""A prompt or a mask of one or several rows, or the output of a tokenizer."""


def prompt_tensors(
    input_ids: Tokens | None, attention_mask: Tokens | None, options: dict[str, Any], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return prompt and mask as tensors of shape (B, N), or None where there is none.

    Takes ``inputs``, transformers' own name for the prompt, out of `options`, and puts in what a tokenizer returned
    besides ids and mask. Lists become tensors on `device`.

    Raises
    ------
    ValueError
        If the prompt is given twice, or is not made of token ids.
    """
    inputs = options.pop("inputs", None)
    if inputs is not None:
        if input_ids is not None:
            raise ValueError("the prompt is given twice: pass either input_ids or inputs")
        input_ids = inputs
    if isinstance(input_ids, Mapping):
        encoded = dict(input_ids)
        if attention_mask is not None:
            encoded["attention_mask"] = attention_mask
        twice = sorted(encoded.keys() & options.keys())
        if twice:
            raise ValueError(f"{twice[0]} is given twice: in input_ids and as an argument")
        input_ids, attention_mask = encoded.pop("input_ids", None), encoded.pop("attention_mask", None)
        options.update(encoded)
    return _tensor("input_ids", input_ids, device), _tensor("attention_mask", attention_mask, device)


def _tensor(name: str, value: Any, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{name}={brief_repr(value)} is not a tensor of token ids: allowed are a tensor, a list, and lists "
                "of equal length (pad shorter ones on the left and pass attention_mask)"
            ) from error
    if value.ndim == 1:
        value = value[None]
    if name == "input_ids" and (value.ndim != 2 or value.is_floating_point() or value.is_complex()):
        raise ValueError(
            f"input_ids of shape {tuple(value.shape)} and type {value.dtype}: allowed are integers of shape (B, N) "
            "or (N,)"
        )
    return value
