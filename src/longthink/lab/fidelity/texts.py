"""Texts to read: questions with reasoning, or plain text, from JSON lines or Parquet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longthink.errors import DataError
from longthink.lab.evaluate import files
from longthink.lab.evaluate.files import ID_FIELDS, find_field, read_records, text_of

REASONING_FIELDS = ("reasoning", "reasoning_content", "generation", "response", "completion", "output")
PLAIN_FIELDS = ("text", "content")
QUESTION_FIELDS = (*files.QUESTION_FIELDS, "instruction")


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text, in which the cache is bounded from the reasoning on.

    Attributes
    ----------
    question
        What the user asked; None for plain text.
    body
        What follows it: reasoning, or the whole of a plain text. None: the model's own answer, still to be made.
    builtin
        Whether the question is a problem of the built-in task, whose prompt is used as it is.
    limit
        Most tokens of an answer.
    """

    source: str
    id: str
    question: str | None
    body: str | None
    builtin: bool = False
    limit: int | None = None


class Encoded(NamedTuple):
    """Tokens of a text: those of the prompt, which is read at once, and those that are decoded."""

    prompt: tuple[int, ...]
    decoded: tuple[int, ...]


def read_texts(paths: Sequence[Path], count: int | None = None) -> list[Text]:
    """Read files of texts, the first `count` of each; `DataError` names the place of what cannot be read."""
    texts: list[Text] = []
    for path in paths:
        if any(text.source == path.stem for text in texts):
            raise DataError(f"two files would both be source {path.stem!r}: rename one ({path})")
        seen: dict[str, str] = {}
        found: list[Text] = []
        for place, record in read_records(path):
            text = _text(place, record, path.stem)
            if text.id in seen:
                raise DataError(
                    f"{place}: text {text.id!r} is also at {seen[text.id]}; expected unique texts"
                )
            seen[text.id] = place
            found.append(text)
        texts += found[:count]
    return texts


def _text(place: str, record: Mapping[str, Any], source: str) -> Text:
    question, body = find_field(record, QUESTION_FIELDS), find_field(record, REASONING_FIELDS)
    if body is None or question is None:
        question, body = None, find_field(record, PLAIN_FIELDS)
    if body is None:
        raise DataError(
            f"{place}: expected a question ({', '.join(QUESTION_FIELDS)}) with reasoning "
            f"({', '.join(REASONING_FIELDS)}), or plain text ({', '.join(PLAIN_FIELDS)}); found "
            f"{', '.join(record) or 'none'}"
        )
    asked = None if question is None else text_of(place, record, question)
    told, name = text_of(place, record, body), find_field(record, ID_FIELDS)
    digest = hashlib.sha256(f"{asked}\n{told}".encode()).hexdigest()[:12]
    return Text(
        source=source, id=digest if name is None else text_of(place, record, name), question=asked, body=told
    )
