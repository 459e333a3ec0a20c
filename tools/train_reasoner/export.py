"""Export of a trained model as a plain Qwen2 checkpoint: weights, configuration and tokenizer."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from longthink.reasoner.vocabulary import BOS, EOS, PAD, TOKEN_IDS, UNK
from tools.train_reasoner.architecture import model_config
from tools.train_reasoner.config import TrainConfig


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the reasoning task: one token per word.

    Any white space separates tokens. Encoding prepends ``<s>`` (and appends no end token), so its output is a prompt
    for `generate`. Decoding joins tokens by spaces and starts a new line at each fact, rule, query and line of the
    chain of thought.
    """
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, TOKEN_IDS[BOS])]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            # No token starts with "##", so this only joins tokens by spaces.
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r" (?=[a-z]+=|\?|#)|(?<!;) (?=[a-z]+:)"), "\n"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _save_tokenizer(folder: Path) -> None:
    build_tokenizer().save_pretrained(folder)
    # Older versions of transformers know the class by this name only, newer ones by both.
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
        Files of an older export are replaced.
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
    # transformers requires the metadata "format".
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
