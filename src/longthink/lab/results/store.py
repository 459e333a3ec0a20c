"""Append-only store of records: Parquet files in a folder, read with DuckDB.

``add`` writes one new file and never touches another, so any number of processes may add at the same time. The first
record with a key counts, wherever copies may lie. That also makes compaction safe: the merged file is complete on
disk before the files that it replaces are deleted; until then their rows are copies.
"""

import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longthink.errors import ResultStoreError, needs_extra
from longthink.files import remove_stale, replacing, write_text
from longthink.lab.results.records import Fidelity, Record, Sample
from longthink.lab.results.schema import TABLES, arrow_schema, check_schema, checked_row, sql_columns

with needs_extra("eval"):
    import duckdb
    import pyarrow as pa
    from pyarrow import parquet

MARKER = "longthink-store"  # file that marks a folder as a store; it holds the version of the format
FORMAT = "1"
FILE_ROWS = 20_000  # compaction leaves files with this many rows alone

_GENERATION = re.compile(r"(.*)-g(\d+)")


class ResultStore:
    """The records in a folder: ``FOLDER/samples/*.parquet``, and the same for ``fidelity`` and ``measurements``.

    File names sort in the order of writing. Needs a file system with POSIX file locks. `ResultStoreError` if the
    folder holds something else, has another format, or is missing and not to be created.
    """

    def __init__(self, folder: Path | str, *, create: bool = True) -> None:
        self.folder = Path(folder)
        self._verified: set[Path] = set()
        marker = self.folder / MARKER
        if create and not marker.exists():
            self._make()
        if not marker.is_file():
            raise ResultStoreError(f"{self.place} is not a result store: it has no file {MARKER}")
        if (found := marker.read_text().strip()) != FORMAT:
            raise ResultStoreError(
                f"{self.place} is a result store of format {found!r}: allowed is {FORMAT!r}"
            )

    @property
    def place(self) -> str:
        """Where the store is, in messages."""
        return str(self.folder)

    @property
    def name(self) -> str:
        """Last part of `place`."""
        return self.folder.resolve().name

    def _make(self) -> None:
        if self.folder.exists():
            if not self.folder.is_dir():
                raise ResultStoreError(f"{self.folder} is not a folder")
            refuse_foreign(self.place, [path.name for path in self.folder.iterdir()])
        for table in TABLES:
            (self.folder / table).mkdir(parents=True, exist_ok=True)
        write_text(self.folder / MARKER, f"{FORMAT}\n")

    def add(self, *records: Record) -> list[Path]:
        """Add records; return the new files, one per table.

        All are on disk when this returns, or none if one of them is invalid.
        """
        rows: dict[str, list[dict[str, Any]]] = {}
        files = []
        for record, row in zip(records, map(checked_row, records), strict=True):
            rows.setdefault(record.table, []).append(row)
        for table, values in rows.items():
            (self.folder / table).mkdir(exist_ok=True)  # tools such as git drop empty folders
            name = f"{time.time_ns():020d}-{secrets.token_hex(6)}.parquet"
            files.append(self.folder / table / name)
            _write(pa.Table.from_pylist(values, arrow_schema(table)), files[-1])
        return files

    def done(self, kind: type[Sample] | type[Fidelity], config: str) -> set[tuple[Any, ...]]:
        """Return the rest of the key of every stored record of a setup (its `config_hash`)."""
        names = kind.key[1:]
        rows = self.query(f"SELECT {', '.join(names)} FROM {kind.table} WHERE config = ?", (config,))
        return {tuple(row[name] for name in names) for row in rows}

    def query(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
        """Run a DuckDB query over the views ``samples``, ``fidelity`` and ``measurements``, with each record once.

        Returns its rows. `parameters` are values for each ``?`` in the query, or by name for ``$name``.
        `ResultStoreError` names a file that is damaged or of another kind.
        """
        # The lock keeps compaction from deleting files between listing and reading them.
        offline: dict[str, Any] = {"autoinstall_known_extensions": False}
        with self._lock(exclusive=False), duckdb.connect(config=offline) as link:
            for table in TABLES:
                self._make_view(link, table)
            cursor = link.execute(sql, parameters if isinstance(parameters, Mapping) else list(parameters))
            names = [column[0] for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _make_view(self, link: duckdb.DuckDBPyConnection, table: str) -> None:
        files = self._files(table)
        for path in [path for path in files if path not in self._verified]:  # each is read once to check it
            with _reading(path, table) as file:
                for _ in file.iter_batches():
                    pass
            self._verified.add(path)
        link.execute(f"CREATE TABLE none_of_{table} ({sql_columns(table)})")
        source = f"SELECT * FROM none_of_{table}"
        if files:
            listed = ", ".join("'" + str(path).replace("'", "''") + "'" for path in files)
            key = ", ".join(TABLES[table].key)
            # BY NAME fills optional columns that old files lack.
            source += (
                f" UNION ALL BY NAME SELECT * EXCLUDE (filename, file_row_number) FROM read_parquet([{listed}], "
                f"union_by_name = true, filename = true, file_row_number = true) "
                f"QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY filename, file_row_number) = 1"
            )
        link.execute(f"CREATE VIEW {table} AS {source}")

    def _files(self, table: str) -> list[Path]:
        found = (self.folder / table).glob("*.parquet")
        return sorted(path.absolute() for path in found if not path.name.startswith("."))

    def compact(self) -> None:
        """Merge small files into large ones; a kill loses and duplicates nothing, and others may add meanwhile."""
        with self._lock(exclusive=True):
            for table in TABLES:
                self._merge(table)

    def _merge(self, table: str) -> None:
        seen: set[tuple[Any, ...]] = set()
        parts: list[pa.Table] = []
        paths: list[Path] = []
        for path in [*self._files(table), None]:
            full = sum(part.num_rows for part in parts) >= FILE_ROWS
            if paths and (path is None or full):
                _replace(paths, parts)
                parts, paths = [], []
            if path is None:
                break
            with _reading(path, table) as file:
                rows = file.read()
            is_first = []
            for key in zip(*(rows.column(name).to_pylist() for name in TABLES[table].key), strict=True):
                is_first.append(key not in seen)
                seen.add(key)
            parts.append(rows.filter(is_first))
            paths.append(path)
        remove_stale(self.folder / table)

    @contextmanager
    def _lock(self, *, exclusive: bool) -> Iterator[None]:
        import fcntl

        with (self.folder / MARKER).open() as marker:
            fcntl.flock(marker, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield


def refuse_foreign(place: str, names: Iterable[str]) -> None:
    """Raise `ResultStoreError` if names in a place without a marker show that something else is there."""
    # Another process may be creating the same store.
    shown = sorted(name for name in names if not name.startswith("."))
    if set(shown) - {MARKER, *TABLES}:
        raise ResultStoreError(f"{place} holds something else ({shown[0]}): give a new or an empty folder")


def _replace(paths: list[Path], parts: list[pa.Table]) -> None:
    if len(paths) == 1:
        return
    # The first file's name and a number sort behind that file, and before all that follow the last one.
    stem = match[1] if (match := _GENERATION.fullmatch(paths[0].stem)) else paths[0].stem
    numbers = [int(match[2]) for path in paths if (match := _GENERATION.fullmatch(path.stem))]
    merged = paths[0].with_name(f"{stem}-g{max(numbers, default=0) + 1:06d}.parquet")
    _write(pa.concat_tables(parts, promote_options="default"), merged)
    for path in paths:
        path.unlink()


def _write(rows: pa.Table, path: Path) -> None:
    with replacing(path) as temporary:
        # Statistics copy values without a checksum, and would be larger than the values of small files.
        options = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
        parquet.write_table(rows, temporary, compression="zstd", **options)


@contextmanager
def _reading(path: Path, table: str) -> Iterator[Any]:
    """Open a Parquet file of a table with checksums; all errors name the file."""
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            check_schema(table, file.schema_arrow, str(path))
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ResultStoreError(f"{path} is damaged: {' '.join(str(error).split())[:300]}") from error
