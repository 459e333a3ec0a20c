"""Writing a trained model as a plain Qwen2 checkpoint folder."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from longthink.reasoner.architecture import model_config
from longthink.reasoner.config import TrainConfig
from longthink.reasoner.tokenizer import build_tokenizer


def _save_tokenizer(folder: Path) -> None:
    build_tokenizer().save_pretrained(folder)
    # Older transformers know the class by its first name only; newer ones know both.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def export_model(
    folder: Path, config: TrainConfig, weights: dict[str, Tensor], *, training: dict[str, Any]
) -> None:
    """Write weights, configuration, tokenizer and ``training.json``.

    Parameters
    ----------
    folder
        Written to; files of an older export are replaced.
    config
        Settings the weights were trained with.
    weights
        fp32 weights under the names of ``Qwen2ForCausalLM``; the tied output layer is left out.
    training
        Facts of the run (steps, tokens, seconds ...), kept with the versions and the date.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = model_config(config)
    shape.save_pretrained(folder)
    GenerationConfig(
        pad_token_id=shape.pad_token_id, bos_token_id=shape.bos_token_id, eos_token_id=shape.eos_token_id
    ).save_pretrained(folder)
    _save_tokenizer(folder)
    tensors = {name: weight.contiguous() for name, weight in weights.items()}
    # Metadata "format" is what transformers looks for.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    facts = {
        "config": config.to_dict(),
        "run": training,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} CPU thread(s)",
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
