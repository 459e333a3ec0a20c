"""The model to benchmark: one that `load_model` finds, or a random one of a given shape."""

import time

from longthink.config import check_choice, check_int
from longthink.models import Loaded, load_model, pick_device

RANDOM = "random:layers=8,hidden=512,heads=8,kv_heads=2,head_dim=64"
"""The default model: made from a fixed seed, so that every machine measures the same one."""

_SHAPE = ("layers", "hidden", "heads", "kv_heads", "head_dim")
_VOCABULARY = 1024
_MAX_POSITIONS = 1 << 20


def bench_model(name: str = RANDOM, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Return the model to benchmark: anything that `longthink.models.load_model` takes, or a random one.

    ``random:`` and any of layers, hidden, heads, kv_heads and head_dim (the rest as in `RANDOM`) is a Qwen2 with
    random weights (float32 for ``auto``), an MLP three times as wide as the model, and a vocabulary of 1024 tokens.
    """
    if name.partition(":")[0] != "random":
        return load_model(name, device=device, dtype=dtype)
    started = time.monotonic()
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = random_shape(name)
    config = Qwen2Config(
        vocab_size=_VOCABULARY, hidden_size=shape["hidden"], intermediate_size=3 * shape["hidden"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"], head_dim=shape["head_dim"],
        max_position_embeddings=_MAX_POSITIONS,
    )  # fmt: skip
    where = pick_device(torch, device)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(where, torch.float32 if dtype == "auto" else getattr(torch, dtype))
    return Loaded(
        model=model.eval(), tokenizer=None,
        name=":".join(["random", ",".join(f"{field}={shape[field]}" for field in _SHAPE)]), revision=None,
        builtin=False, seconds=time.monotonic() - started,
    )  # fmt: skip


def random_shape(name: str) -> dict[str, int]:
    shape = _fields(RANDOM) | _fields(name)
    for field, value in shape.items():
        check_int(field, value, 1)
    if shape["heads"] % shape["kv_heads"]:
        raise ValueError(f"kv_heads={shape['kv_heads']} must divide heads={shape['heads']}")
    if shape["head_dim"] % 2:
        raise ValueError(f"head_dim={shape['head_dim']} must be even")
    return shape


def _fields(name: str) -> dict[str, int]:
    fields = {}
    for part in filter(None, name.partition(":")[2].split(",")):
        field, _, text = part.partition("=")
        check_choice("field of a random model", field, _SHAPE)
        try:
            fields[field] = int(text)
        except ValueError:
            raise ValueError(f"{field}={text!r} must be an integer: allowed is >= 1") from None
    return fields
