"""Problem files: JSON lines or Parquet, with the usual names of fields."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longthink.errors import DataError, needs_extra
from longthink.lab.evaluate.answers import stated_answer

_log = logging.getLogger(__name__)

QUESTION_FIELDS = ("question", "problem", "prompt")
ANSWER_FIELDS = ("final_answer", "answer", "ground_truth", "solution")
ID_FIELDS = ("id", "unique_id", "problem_id", "uid")
"""Names of fields, best first. Case does not count, nor whether words are joined by a space, "-" or "_"."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A problem as a file or a data set has it.

    Attributes
    ----------
    id
        Its own identifier, or else the beginning of the SHA-256 of the question: the same wherever it stands.
    question, gold
        What is asked, and the right final answer.
    """

    id: str
    question: str
    gold: str


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which field of a row holds what; ``id`` is None where there is none."""

    question: str
    answer: str
    id: str | None


def read_file(path: Path) -> list[Row]:
    """Read the problems of a ``.jsonl`` or ``.parquet`` file.

    Raises
    ------
    DataError
        If the file is something else or a problem lacks a field; the message names file, line or row, and what was
        expected.
    MissingExtraError
        If pyarrow is needed and not installed.
    OSError
        If the file cannot be read.
    """
    if path.suffix == ".jsonl":
        return to_rows(_json_lines(path))
    if path.suffix == ".parquet":
        return to_rows(_parquet_rows(path))
    raise DataError(f"{path}: its name ends in {path.suffix!r}; expected a .jsonl or .parquet file")


def to_rows(records: Iterator[tuple[str, Mapping[str, Any]]], fields: Fields | None = None) -> list[Row]:
    """Turn records into problems; a question that stands there twice is two problems, and a warning is logged.

    Parameters
    ----------
    records
        Pairs of a place to name in messages and the fields found there.
    fields
        Which fields to read; None finds them by name in the first record.

    Raises
    ------
    DataError
        If there is no record, a field is missing or of no use, or an identifier comes twice.
    """
    rows: list[Row] = []
    seen: dict[str, str] = {}
    asked: dict[str, str] = {}
    repeated: list[tuple[str, str]] = []
    for place, record in records:
        fields = fields or _detect(place, record)
        row = _row(place, record, fields)
        if fields.id is not None and row.id in seen:
            raise DataError(
                f"{place}: {fields.id}={row.id!r} stands at {seen[row.id]} too; expected each once"
            )
        if row.id in seen:  # The same question again, and no identifier to tell them apart.
            row = Row(id=f"{row.id}-{len(rows)}", question=row.question, gold=row.gold)
        if row.question in asked:
            repeated.append((place, asked[row.question]))
        asked.setdefault(row.question, place)
        seen[row.id] = place
        rows.append(row)
    if not rows:
        raise DataError("no problems found; expected at least one")
    if repeated:
        _log.warning(
            "%d of %d problems ask a question that was asked before, first %s (as %s); each of them counts",
            len(repeated),
            len(rows),
            *repeated[0],
        )
    return rows


def _detect(place: str, record: Mapping[str, Any]) -> Fields:
    names = {name.lower().replace(" ", "_").replace("-", "_"): name for name in record}

    def find(wanted: tuple[str, ...]) -> str | None:
        return next((names[name] for name in wanted if name in names), None)

    question, answer = find(QUESTION_FIELDS), find(ANSWER_FIELDS)
    if question is None or answer is None:
        lacking, wanted = ("question", QUESTION_FIELDS) if question is None else ("answer", ANSWER_FIELDS)
        raise DataError(
            f"{place}: no field holds the {lacking}; expected one of {', '.join(wanted)}, "
            f"found {', '.join(record) or 'none'}"
        )
    return Fields(question=question, answer=answer, id=find(ID_FIELDS))


def _row(place: str, record: Mapping[str, Any], fields: Fields) -> Row:
    question = _text(place, record, fields.question)
    answer = _text(place, record, fields.answer)
    gold = stated_answer(answer)
    if gold is None and fields.answer.lower() == "solution":
        raise DataError(
            f"{place}: field {fields.answer!r} states no final answer; "
            "expected \\boxed{...}, or a line that begins with #### or A:"
        )
    if fields.id is None:
        name = hashlib.sha256(question.encode()).hexdigest()[:12]
    else:
        name = _text(place, record, fields.id)
    return Row(id=name, question=question, gold=gold or answer)


def _text(place: str, record: Mapping[str, Any], field: str) -> str:
    """Return a field as text, without the white space around it."""
    if field not in record:
        raise DataError(f"{place}: field {field!r} is missing; expected text or a number")
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{place}: field {field!r} is {_shown(value)}; expected text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{place}: field {field!r} is {value}; expected text or a finite number")
    text = str(value).strip()
    if not text:
        raise DataError(f"{place}: field {field!r} is empty; expected text or a number")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {field!r} has half of a surrogate pair; expected valid Unicode"
        ) from error
    return text


def _shown(value: Any) -> str:
    words = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return words.get(type(value), type(value).__name__)


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    empty = True
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                record = json.loads(line) if line else None
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: byte {error.start} is not UTF-8; expected UTF-8 text") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: {error}; expected one JSON object a line") from error
            if not line:
                continue
            if not isinstance(record, dict):
                raise DataError(
                    f"{place}: {_shown(record)} instead of an object; expected one JSON object a line"
                )
            empty = False
            yield place, record
    if empty:
        raise DataError(f"{path}: the file holds no problem; expected one JSON object a line")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with needs_extra("eval"):
        import pyarrow
        from pyarrow import parquet
    with path.open("rb") as file:
        try:
            table = parquet.read_table(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: {error}; expected a Parquet file") from error
    if not table.num_rows:
        raise DataError(f"{path}: the file holds no problem; expected at least one row")
    for number, record in enumerate(table.to_pylist(), 1):
        yield f"{path}, row {number}", record
