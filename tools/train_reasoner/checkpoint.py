"""Training state on disk: tensors as safetensors, everything else as JSON.

A checkpoint is a folder, written beside the old one and then renamed, so that an interruption at any moment leaves a
complete one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.train_reasoner.architecture import EMBEDDING
from tools.train_reasoner.batches import KINDS
from tools.train_reasoner.config import TrainConfig
from tools.train_reasoner.initial import BASIS, embedding_map

FOLDER = "checkpoint"


@dataclass
class State:
    """The state of a run apart from its tensors."""

    longest: int
    """Longest problem the curriculum has reached, in lines."""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Wall-clock time of training, summed over resumed runs."""
    measured: int = 0
    """Batches of the longest length since it was reached."""
    accuracy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    """Running accuracy on those batches, by kind of token."""
    before: list[dict[str, Any]] = field(default_factory=list)
    """Settings and final states of the runs whose weights this one started with, oldest first."""


def save_checkpoint(out: Path, config: TrainConfig, state: State, tensors: dict[str, Tensor]) -> None:
    """Write ``out/checkpoint``, replacing an older one."""
    target, fresh, old = (out / (FOLDER + suffix) for suffix in ("", ".new", ".old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(tensors, fresh / "state.safetensors")
    text = json.dumps({"config": config.to_dict(), "state": asdict(state)}, indent=2)
    (fresh / "state.json").write_text(text + "\n")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def weights_to_start_with(folder: Path) -> tuple[TrainConfig, State, dict[str, Tensor]]:
    """Read the last checkpoint of a run, or a model that a run has exported.

    Raises
    ------
    ValueError
        If the folder holds neither.
    """
    if load_checkpoint(folder) is None and (folder / "training.json").exists():
        facts = json.loads((folder / "training.json").read_text())
        weights = load_file(folder / "model.safetensors")
        # The embedding lies in the span of the map, so its basis is found again without an error.
        basis = torch.linalg.lstsq(
            embedding_map(), weights.pop(EMBEDDING), driver="gelsd"
        ).solution.contiguous()
        return TrainConfig(**facts["config"]), State(**facts["run"]), {BASIS: basis, **weights}
    return require_checkpoint(folder)


def require_checkpoint(out: Path) -> tuple[TrainConfig, State, dict[str, Tensor]]:
    """Read ``out/checkpoint``.

    Raises
    ------
    ValueError
        If there is none.
    """
    loaded = load_checkpoint(out)
    if loaded is None:
        raise ValueError(f"{str(out)!r} holds no checkpoint: allowed is the folder of a training run")
    return loaded


def load_checkpoint(out: Path) -> tuple[TrainConfig, State, dict[str, Tensor]] | None:
    """Read ``out/checkpoint``; return None if there is none."""
    # Between the two renames there is only the old one.
    for folder in (out / FOLDER, out / (FOLDER + ".old")):
        if (folder / "state.json").exists():
            data = json.loads((folder / "state.json").read_text())
            tensors = load_file(folder / "state.safetensors")
            return TrainConfig(**data["config"]), State(**data["state"]), tensors
    return None


def optimizer_tensors(optimizer: torch.optim.AdamW, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the optimizer's state as a flat dictionary ``name/key``."""
    state = optimizer.state
    return {
        f"{name}/{key}": value for name, master in masters.items() for key, value in state[master].items()
    }


def restore_optimizer(
    optimizer: torch.optim.AdamW, masters: Mapping[str, Tensor], tensors: dict[str, Tensor]
) -> None:
    """Undo `optimizer_tensors`."""
    for name, master in masters.items():
        keys = [key for key in tensors if key.startswith(f"{name}/")]
        optimizer.state[master] = {key.rpartition("/")[2]: tensors[key] for key in keys}
