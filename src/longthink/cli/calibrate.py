"""``longthink calibrate``: statistics of a model's queries, for policies that read them from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longthink.cli.models import load_model
from longthink.cli.options import ModelOptions
from longthink.cli.progress import progress
from longthink.cli.terminal import note
from longthink.config import check_int
from longthink.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def calibrate(
    model: str, /, *,
    data: Path, out: Path, max_tokens: int = 4096, adapter: str | None = None, device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> int:  # fmt: skip
    """Collect statistics of a model's queries over texts, for --policy tri_attention:stats=FILE.

    Parameters
    ----------
    model
        Hub id or local folder of a causal language model (safetensors), or "reasoner", the built-in one.
    data
        UTF-8 file of JSON lines, each an object with a "text"; any coherent text will do.
    out
        File to write (safetensors); an existing one is replaced as a whole.
    max_tokens
        Largest number of tokens to read of each text.
    adapter
        Hub id or local folder of a PEFT adapter (safetensors), which is merged into the model.
    device
        Device such as cpu or cuda:1; auto takes the first accelerator, if any.
    dtype
        Number format of weights and cache; auto takes the checkpoint's own.
    """
    check_int("max_tokens", max_tokens, 1)
    texts = list(_texts(data))
    loaded = load_model(ModelOptions(model=model, adapter=adapter, device=device, dtype=dtype))
    from longthink.hf.calibration import calibrate as collect
    from longthink.hf.query_stats import save_query_stats

    with progress("reading texts"):
        means, tokens = collect(loaded.model, _token_ids(loaded.tokenizer, texts, max_tokens))
    save_query_stats(out, loaded.model, means, tokens)
    note(f"{out}: {len(means)} layers, from {tokens:,} tokens of {len(texts):,} texts")
    return 0


def _texts(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}; expected an object in JSON") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f'{path}, line {number}: expected an object with a "text" that is a string')
        yield row["text"]


def _token_ids(tokenizer: Any, texts: list[str], most: int) -> Iterator[Tensor]:
    for text in texts:
        ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[:, :most]
        if ids.shape[1]:
            yield ids
