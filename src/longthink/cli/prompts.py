"""Reading a prompt from an argument, a file or standard input, and encoding it."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longthink.cli.terminal import is_terminal, note

if TYPE_CHECKING:
    from torch import Tensor

STDIN = "-"


def read_prompt(prompt: str | None, file: str | None) -> str | None:
    """Return the prompt from the argument, the file or standard input (``-``), or None if there is none.

    Standard input is also read if it is piped and neither is given.
    """
    if prompt is not None and file is not None:
        raise ValueError("give the prompt once: as an argument, with --file, or on standard input")
    if prompt is not None:
        return _checked(prompt, "the prompt")
    if file not in (None, STDIN):
        return _checked(from_utf8(Path(file).read_bytes(), file), file)
    if file is None and not _is_piped():
        return None
    if sys.stdin is None:
        raise ValueError("standard input is closed: pass the prompt as an argument or with --file")
    if is_terminal(sys.stdin):
        note("type the prompt, then press Ctrl-D on a line of its own")
    text = from_utf8(sys.stdin.buffer.read(), "standard input")
    if file is None and not text.strip():
        return None
    return _checked(text, "standard input")


def encode_prompt(tokenizer: Any, prompt: str, *, raw: bool) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of one row; the chat template, if any, is applied unless ``raw``."""
    if raw or not tokenizer.chat_template:
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    if encoded["input_ids"].shape[-1] == 0:
        raise ValueError("the prompt has no tokens")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def check_words(tokenizer: Any, prompt: str) -> None:
    """Raise `ValueError` naming the first words of the prompt that a word-level tokenizer does not know."""
    known = tokenizer.get_vocab()
    unknown = [word for word in prompt.split() if word not in known]
    if unknown:
        raise ValueError(
            f"the built-in model does not know {', '.join(map(repr, unknown[:3]))}: it reads only problems such as "
            "those of `longthink reasoner problem`; for other text use --model"
        )


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file, and so meant to be read."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def from_utf8(data: bytes, source: str | None) -> str:
    """Return the text of some bytes, whatever the locale; `ValueError` names the source if they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text (byte {error.start})") from error


def _checked(text: str, source: str | None) -> str:
    if not text.strip():
        raise ValueError(f"{source} is empty")
    # The newline at the end of a text file is not part of the prompt.
    return text.removesuffix("\n")
