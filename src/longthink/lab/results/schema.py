"""Column types of the record tables, derived from the dataclasses, and the checks on reading and writing."""

import math
from dataclasses import fields
from functools import cache
from typing import Any, get_args, get_type_hints

from longthink.errors import ResultStoreError, needs_extra
from longthink.lab.results.records import Fidelity, Measurement, Record, Sample, to_row

with needs_extra("eval"):
    import pyarrow as pa

TABLES: dict[str, type[Record]] = {kind.table: kind for kind in (Sample, Fidelity, Measurement)}

_SQL = {str: "VARCHAR", int: "BIGINT", float: "DOUBLE", bool: "BOOLEAN"}
_INT64 = range(-(2**63), 2**63)


@cache
def columns(table: str) -> dict[str, tuple[type, bool]]:
    hints = get_type_hints(TABLES[table])
    found = {}
    for field in fields(TABLES[table]):
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        (kind,) = set(kinds) - {type(None)}
        found[field.name] = (kind, type(None) in kinds)
    return found


def arrow_schema(table: str) -> pa.Schema:
    types = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    fields = [pa.field(name, types[kind], optional) for name, (kind, optional) in columns(table).items()]
    return pa.schema(fields)


def sql_columns(table: str) -> str:
    return ", ".join(f'"{name}" {_SQL[kind]}' for name, (kind, _) in columns(table).items())


def checked_row(record: Record) -> dict[str, Any]:
    """Return the fields of a record by name; `ResultStoreError` names a value that is not of its field's type."""
    if type(record) not in TABLES.values():
        allowed = ", ".join(kind.__name__ for kind in TABLES.values())
        raise ResultStoreError(f"{type(record).__name__} is not a record: allowed are {allowed}")
    row = to_row(record)
    for name, (kind, optional) in columns(record.table).items():
        row[name] = _checked(f"{type(record).__name__}.{name}", row[name], kind, optional)
    return row


def _checked(field: str, value: Any, kind: type, optional: bool) -> Any:
    """Return a value in its column's type; an int is accepted as a float, a bool never as a number."""
    if value is None and optional:
        return None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is int and value not in _INT64):
        allowed = f"{kind.__name__}{' of 64 bits' if kind is int else ''}{' or None' if optional else ''}"
        raise ResultStoreError(f"{field}={value!r} must be {allowed}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ResultStoreError(f"{field}={value!r} must be finite")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ResultStoreError(f"{field} holds half a character (a lone surrogate): {error}") from None
    return value


def check_schema(table: str, found: pa.Schema, file: str) -> None:
    """Raise `ResultStoreError` for a file's columns. Optional ones may be missing: older files stay readable."""
    wanted = arrow_schema(table)
    faults = [f"unknown column {name!r}" for name in found.names if name not in wanted.names]
    for field in wanted:
        count = found.names.count(field.name)
        if count == 0 and not field.nullable:
            faults.append(f"no column {field.name!r}")
        elif count > 1:
            faults.append(f"column {field.name!r} is there {count} times")
        elif count == 1 and found.field(field.name).type != field.type:
            faults.append(f"column {field.name!r} is {found.field(field.name).type}, must be {field.type}")
    if faults:
        raise ResultStoreError(f"{file} does not hold {table} of longthink: {'; '.join(faults)}")
