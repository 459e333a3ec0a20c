"""Statistics of a model's queries before RoPE in a safetensors file: see `longthink.hf.calibration`.

Shape suffixes: H query heads, F frequency pairs, N = H x 3 x F numbers of a layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from longthink._version import __version__
from longthink.errors import StatsFileError
from longthink.files import replacing
from longthink.hf.fingerprint import model_fingerprint
from longthink.policies import Calibrated, Policy

FORMAT = "longthink.query_stats"
FORMAT_VERSION = "1"


def save_query_stats(path: Path, model: PreTrainedModel, means: Sequence[Tensor], tokens: int) -> None:
    """Write the means of all layers as a whole file, or leave the old one.

    Raises
    ------
    StatsFileError
        If the file cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "longthink": __version__,
        "tokens": str(tokens),
        "model": json.dumps(model_fingerprint(model)),
    }
    try:
        with replacing(path) as temporary:
            save_file({_name(i): layer.contiguous() for i, layer in enumerate(means)}, temporary, metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StatsFileError(f"cannot write statistics to {str(path)!r}: {reason}") from error


def load_query_stats(path: Path, model: PreTrainedModel) -> list[Tensor]:
    """Means of all layers, H3F, from a file that was made with this model.

    Weights are compared if the model has the number format that it had then; its layout always is.

    Raises
    ------
    StatsFileError
        If the file cannot be read, is damaged, or belongs to another model.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        raise StatsFileError(
            f"cannot read statistics from {str(path)!r}: {error.strerror or error}"
        ) from error
    except SafetensorError as error:
        raise StatsFileError(f"{str(path)!r} is damaged or not a safetensors file: {error}") from error
    if faults := "; ".join(_faults(metadata, tensors, model_fingerprint(model))):
        raise StatsFileError(f"{str(path)!r} holds no statistics for this model: {faults}")
    return [tensors[_name(i)] for i in range(len(tensors))]


def calibrated_means(model: PreTrainedModel, policies: Mapping[int, Policy]) -> dict[int, Tensor]:
    """Means of the layers whose policy reads them from a file, flat, by layer."""
    found: dict[int, Tensor] = {}
    files: dict[str, list[Tensor]] = {}
    for i, policy in policies.items():
        if "calibration" in policy.needs and isinstance(policy, Calibrated):
            name = policy.stats_file()
            if name not in files:
                files[name] = load_query_stats(Path(os.path.expanduser(name)), model)
            found[i] = files[name][i].flatten()
    return found


def _name(layer: int) -> str:
    return f"layer.{layer}"


def _faults(metadata: dict[str, str], tensors: dict[str, Tensor], model: dict[str, Any]) -> list[str]:
    found = (metadata.get("format"), metadata.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        return [
            f"found format {found[0]!r} in version {found[1]}, expected {FORMAT!r} in version {FORMAT_VERSION}"
        ]
    try:
        made_with = json.loads(metadata.get("model", ""))
    except ValueError:
        made_with = None
    if not isinstance(made_with, dict):
        return ["its metadata does not say which model it was made with"]
    same_format = made_with.get("dtype") == model["dtype"]
    compared = [name for name in model if name != "dtype" and (same_format or name != "weights")]
    faults = [
        f"{name} was {made_with.get(name)!r} and is {model[name]!r}"
        for name in compared
        if made_with.get(name) != model[name]
    ]
    shape = (model["heads"], 3, model["head_dim"] // 2)
    if tensors.keys() != {_name(i) for i in range(model["layers"])}:
        faults.append(
            f"it has tensors {', '.join(sorted(tensors))}, expected one for each of {model['layers']} layers"
        )
    faults += [
        f"{name} has shape {tuple(tensor.shape)} in {tensor.dtype}, expected finite float32 numbers of shape {shape}"
        for name, tensor in tensors.items()
        if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.isfinite().all()
    ]
    return faults
