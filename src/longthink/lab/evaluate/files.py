"""Problem files: JSON lines or Parquet, with the usual field names."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from longthink.errors import DataError, needs_extra
from longthink.lab.evaluate.answers import stated_answer

_log = logging.getLogger(__name__)

QUESTION_FIELDS = ("question", "problem", "prompt")
ANSWER_FIELDS = ("final_answer", "answer", "ground_truth", "solution")
ID_FIELDS = ("id", "unique_id", "problem_id", "uid")
"""Field names in order of preference; case and the word separators " ", "-" and "_" do not matter."""

Records = Iterator[tuple[str, Mapping[str, Any]]]  # location for messages, and fields


@dataclass(frozen=True, kw_only=True)
class Item:
    """One problem; `is_builtin` ones are graded exactly, and their prompt is used as it is.

    Those of the task ``fact`` have a `distance`: the model is given the text up to the answer (`facts.given_ids`).
    """

    task: str
    id: str  # its own, else of the SHA-256 of the question; the seed of a problem that is made
    question: str  # for built-in tasks the whole prompt
    gold: str  # right final answer; for built-in tasks words such as ``cow: 55``
    steps: int | None = None  # tokens of the worked solution of a built-in problem
    distance: int | None = None  # tokens between the fact and the question

    @property
    def is_builtin(self) -> bool:
        return self.steps is not None


class Fields(NamedTuple):
    question: str
    answer: str
    id: str | None


def read_file(path: Path) -> list[Item]:
    return to_items(read_records(path), path.stem)


def read_records(path: Path) -> Records:
    """Return the records of a file, each with its place for messages."""
    readers = {".jsonl": _json_lines, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise DataError(f"{path}: its name ends in {path.suffix!r}; expected a .jsonl or .parquet file")
    return readers[path.suffix](path)


def to_items(records: Records, task: str, fields: Fields | None = None) -> list[Item]:
    """Turn records into problems; without `fields` the names are found in the first record.

    A question that is there twice is two problems, and a warning is logged.
    """
    items: list[Item] = []
    seen: dict[str, str] = {}
    asked: dict[str, str] = {}
    repeated: list[tuple[str, str]] = []
    for place, record in records:
        fields = fields or _detect(place, record)
        item = _item(place, record, task, fields)
        if fields.id is not None and item.id in seen:
            twin = seen[item.id]
            raise DataError(f"{place}: {fields.id}={item.id!r} is also at {twin}; expected unique values")
        if item.id in seen:  # the same question twice, without an identifier to tell them apart
            item = replace(item, id=f"{item.id}-{len(items)}")
        if item.question in asked:
            repeated.append((place, asked[item.question]))
        asked.setdefault(item.question, place)
        seen[item.id] = place
        items.append(item)
    if not items:
        raise DataError("no problems found; expected at least one")
    if repeated:
        _log.warning(
            "%d of %d problems ask a question that was asked before, first %s (as %s); each of them counts",
            len(repeated),
            len(items),
            *repeated[0],
        )
    return items


def find_field(record: Mapping[str, Any], wanted: tuple[str, ...]) -> str | None:
    """Return the name of the first of these fields that a record has."""
    names = {name.lower().replace(" ", "_").replace("-", "_"): name for name in record}
    return next((names[name] for name in wanted if name in names), None)


def _detect(place: str, record: Mapping[str, Any]) -> Fields:
    question, answer = find_field(record, QUESTION_FIELDS), find_field(record, ANSWER_FIELDS)
    if question is None or answer is None:
        missing, wanted = ("question", QUESTION_FIELDS) if question is None else ("answer", ANSWER_FIELDS)
        raise DataError(
            f"{place}: no field holds the {missing}; expected one of {', '.join(wanted)}, "
            f"found {', '.join(record) or 'none'}"
        )
    return Fields(question, answer, find_field(record, ID_FIELDS))


def _item(place: str, record: Mapping[str, Any], task: str, fields: Fields) -> Item:
    question, answer = (text_of(place, record, field) for field in (fields.question, fields.answer))
    gold = stated_answer(answer)
    if gold is None and fields.answer.lower() == "solution":
        raise DataError(
            f"{place}: field {fields.answer!r} states no final answer; "
            "expected \\boxed{...}, or a line that begins with #### or A:"
        )
    digest = hashlib.sha256(question.encode()).hexdigest()[:12]
    name = digest if fields.id is None else text_of(place, record, fields.id)
    return Item(task=task, id=name, question=question, gold=gold or answer)


def text_of(place: str, record: Mapping[str, Any], field: str) -> str:
    """Return a field as text, or `DataError`."""
    if field not in record:
        raise DataError(f"{place}: field {field!r} is missing; expected text or a number")
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{place}: field {field!r} is {_json_type(value)}; expected text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{place}: field {field!r} is {value}; expected text or a finite number")
    text = str(value).strip()
    if not text:
        raise DataError(f"{place}: field {field!r} is empty; expected text or a number")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fault = "has half of a surrogate pair; expected valid Unicode"
        raise DataError(f"{place}: field {field!r} {fault}") from error
    return text


def _json_type(value: Any) -> str:
    words = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return words.get(type(value), type(value).__name__)


def _json_lines(path: Path) -> Records:
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
                kind = _json_type(record)
                raise DataError(f"{place}: {kind}, not an object; expected one JSON object a line")
            empty = False
            yield place, record
    if empty:
        raise DataError(f"{path}: the file holds no problem; expected one JSON object a line")


def _parquet_rows(path: Path) -> Records:
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
