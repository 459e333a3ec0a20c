"""Loading the shipped weights."""

import hashlib
from importlib.resources import as_file, files
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM


def load_reasoner(dtype: torch.dtype = torch.float32) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Return the built-in reasoning model and its tokenizer, from the installed package (no network).

    `ValueError` if ``dtype`` is not a floating-point type.

    Examples
    --------
    >>> from longthink.reasoner import grade, load_reasoner, make_problem
    >>> model, tokenizer = load_reasoner()
    >>> problem = make_problem(profile="chain", size="s", seed=1)
    >>> inputs = tokenizer(problem.prompt, return_tensors="pt")
    >>> output = model.generate(**inputs, do_sample=False, max_new_tokens=300)
    >>> grade(problem, tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
    True
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r} is not a floating-point type: allowed are torch.float32, torch.bfloat16 ..."
        )
    with as_file(files("longthink.reasoner") / "weights") as folder:
        return load_folder(folder, dtype)


def weights_revision() -> str:
    """Return the first 12 hex digits of the SHA-256 of the shipped weights."""
    data = (files("longthink.reasoner") / "weights" / "model.safetensors").read_bytes()
    return hashlib.sha256(data).hexdigest()[:12]


def load_folder(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    # Not AutoTokenizer, which turns any tokenizer.json of model type qwen2 into Qwen's byte-level tokenizer.
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
