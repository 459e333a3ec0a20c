"""Traces on disk: a folder with one Parquet file per problem, written in chunks while the model decodes.

A row is one decode step of one layer: for every head the pages that got attention, in order, and their mass in half
precision; mass on unlisted pages is the head's ``rest``. The row with ``now`` -1 holds the prompt: its attention on
itself, summed over queries, for each KV head.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from longthink.errors import TraceError, needs_extra
from longthink.files import remove_stale, write_text

with needs_extra("analyze"):
    import pyarrow as pa
    from pyarrow import parquet

MARKER = "longthink-trace"  # file that marks a folder of traces; it holds format, model and settings as JSON
FORMAT = 1
PROMPT = -1  # `now` of the rows that hold the prompt.
CHUNK_STEPS = 64  # decode steps per chunk; only one chunk is held in memory
_VECTORS = ("query", "key", "value")


@dataclass(frozen=True, kw_only=True)
class Header:
    task: str
    problem: str
    prompt_tokens: int  # images included
    token_ids: tuple[int, ...]  # prompt first; the last was never fed, so it has no step
    texts: tuple[str, ...]
    image: tuple[int, ...] = ()  # positions of image tokens
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float  # factor on q.k
    page_size: int
    top: int
    vectors: bool
    model: dict[str, Any] = field(default_factory=dict)  # see `Loaded.describe`
    finish: str = "length"  # ``stop`` or ``length``

    @property
    def steps(self) -> range:
        """Positions of the tokens whose attention is recorded."""
        return range(self.prompt_tokens, len(self.token_ids) - 1)

    @property
    def pages(self) -> int:
        return -(-self.steps.stop // self.page_size)

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        known = {one.name for one in fields(cls)}
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{name: value for name, value in (values | lists).items() if name in known})

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class TraceStep:
    """One decode step of all layers. Vectors are those of the new token (all for the prompt), layers first."""

    now: int  # position of the reading token; -1 for the prompt
    head: NDArray[np.int64]  # ``layer * heads + head`` (KV heads for the prompt)
    page: NDArray[np.int32]
    mass: NDArray[np.float32]
    rest: NDArray[np.float32]  # mass of each head on pages without an entry
    query: NDArray[np.float32] | None = None
    key: NDArray[np.float32] | None = None
    value: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Trace:
    """One recorded problem, read from its file step by step."""

    path: Path
    header: Header

    @classmethod
    def open(cls, path: Path) -> Self:
        try:
            metadata = parquet.read_metadata(path).metadata or {}
            return cls(path, Header.from_json(metadata[b"longthink"].decode()))
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise TraceError(f"{path} is not a trace or is damaged: {reason}") from error

    def prompt(self) -> TraceStep:
        return next(self._read(first_only=True))

    def steps(self) -> Iterator[TraceStep]:
        return (step for step in self._read() if step.now != PROMPT)

    def _read(self, first_only: bool = False) -> Iterator[TraceStep]:
        try:
            with parquet.ParquetFile(self.path, page_checksum_verification=True) as file:
                for group in range(1 if first_only else file.num_row_groups):
                    yield from self._unpack(file.read_row_group(group))
        except (pa.ArrowException, OSError) as error:
            raise TraceError(f"{self.path} is damaged: {' '.join(str(error).split())}") from error

    def _unpack(self, rows: Any) -> Iterator[TraceStep]:
        header = self.header
        now = rows.column("now").to_numpy()
        lists = [name for name in rows.column_names if name not in ("now", "layer")]
        columns = {name: _flat(rows.column(name)) for name in lists}
        for first in range(0, len(now), header.layers):
            after = first + header.layers
            part = {name: values[at[first] : at[after]] for name, (values, at) in columns.items()}
            counts = part["counts"]
            yield TraceStep(
                now=int(now[first]), head=np.repeat(np.arange(len(counts)), counts), page=part["pages"],
                mass=part["mass"].astype(np.float32), rest=part["rest"].astype(np.float32),
                **self._vectors(part),
            )  # fmt: skip

    def _vectors(self, part: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        header = self.header
        if not header.vectors:
            return {}
        return {name: part[name].reshape(header.layers, -1, header.head_dim).copy() for name in _VECTORS}


def _flat(column: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
    array = column.combine_chunks()
    chunk = array.chunk(0) if hasattr(array, "chunk") else array
    return chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()


class TraceStore:
    """The traces in a folder: all of one model, recorded with the same settings.

    With `settings` to record with, the folder is created; without, it must exist. `TraceError` says what is wrong.
    """

    def __init__(self, folder: Path | str, settings: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        marker = self.folder / MARKER
        if settings is not None and not marker.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise TraceError(f"{self.folder} holds something else: give a new or an empty folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(marker, json.dumps({"format": FORMAT} | dict(settings)))
        if not is_trace_store(self.folder):
            raise TraceError(f"{self.folder} holds no traces: it has no file {MARKER}")
        self.settings = json.loads(marker.read_text())
        if self.settings.pop("format", None) != FORMAT:
            raise TraceError(f"{self.folder} holds traces of another format: allowed is {FORMAT}")
        if settings is not None and self.settings != dict(settings):
            names = sorted({*settings, *self.settings})
            changed = ", ".join(name for name in names if settings.get(name) != self.settings.get(name))
            fault = f"was recorded with other settings ({changed})"
            raise TraceError(f"{self.folder} {fault}: give another folder")
        if settings is not None:
            remove_stale(self.folder)

    def path(self, task: str, problem: str) -> Path:
        digest = hashlib.sha256(f"{task}\0{problem}".encode()).hexdigest()[:20]
        return self.folder / f"{digest}.parquet"

    def traces(self) -> list[Trace]:
        found = [Trace.open(path) for path in sorted(self.folder.glob("*.parquet")) if path.name[0] != "."]
        if not found:
            raise TraceError(f"{self.folder} holds no complete trace yet")
        return sorted(found, key=lambda trace: (trace.header.task, _natural(trace.header.problem)))


def is_trace_store(folder: Path | str) -> bool:
    return (Path(folder) / MARKER).is_file()


def _natural(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() else 0, name)


class TraceWriter(AbstractContextManager["TraceWriter"]):
    """Writes the file of one trace in chunks; complete after `close`. Use it in a ``with`` block."""

    def __init__(self, path: Path, *, vectors: bool) -> None:
        lists = {"counts": pa.int32(), "pages": pa.int32(), "mass": pa.float16(), "rest": pa.float16()}
        lists |= {name: pa.float32() for name in _VECTORS} if vectors else {}
        columns = {"now": pa.int32(), "layer": pa.int16()}
        self._schema = pa.schema(columns | {name: pa.list_(of) for name, of in lists.items()})
        encodings = {"pages": "DELTA_BINARY_PACKED", "counts": "DELTA_BINARY_PACKED"}
        encodings |= {name: "BYTE_STREAM_SPLIT" for name in lists if name not in encodings}
        self._writer = parquet.ParquetWriter(
            path, self._schema, compression="zstd", use_dictionary=False, write_statistics=False,
            write_page_checksum=True,
            column_encoding={f"{name}.list.element": encoding for name, encoding in encodings.items()},
        )  # fmt: skip
        self._rows: dict[str, list[Any]] = {name: [] for name in self._schema.names}

    def add(self, now: int, layer: int, **lists: NDArray[Any]) -> None:
        for name, value in ({"now": now, "layer": layer} | lists).items():
            self._rows[name].append(value)

    def flush(self) -> None:
        if self._rows["now"]:
            arrays = [_column(self._rows[one.name], one.type) for one in self._schema]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
            self._rows = {name: [] for name in self._schema.names}

    def close(self, header: Header) -> None:
        self.flush()
        self._writer.add_key_value_metadata({"longthink": header.to_json()})
        self._writer.close()

    def __exit__(self, *exception: object) -> None:
        self._writer.close()


def _column(values: Sequence[Any], kind: Any) -> Any:
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    offsets = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values), kind.value_type), type=kind)
