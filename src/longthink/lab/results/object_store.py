"""Result stores in object stores (``s3://``, ``gs://``, ``abfs://`` ...), through fsspec.

A store's files are added whole, under names of their own, and never changed: object stores can do that. What they
cannot do, locking and renaming, happens in a local copy.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longthink.errors import MissingExtraError, ResultStoreError, needs_extra
from longthink.lab.results.records import Record
from longthink.lab.results.schema import TABLES
from longthink.lab.results.store import MARKER, ResultStore, refuse_foreign

with needs_extra("eval"):
    import fsspec


def is_url(place: Path | str) -> bool:
    """Return whether a place is not a folder of this machine."""
    return "://" in str(place)


def open_store(place: Path | str, *, create: bool = True) -> ResultStore:
    """Open the store in a folder or under a URL: a `ResultStore` or an `ObjectStore`."""
    if is_url(place):
        return ObjectStore(str(place), create=create)
    return ResultStore(Path(place).expanduser(), create=create)


class ObjectStore(ResultStore):
    """The records under a URL such as ``s3://bucket/results``.

    Opening downloads them to a temporary folder, which `query` reads and ``compact`` compacts. ``add`` returns when
    the new files are uploaded. What others have added meanwhile is seen when the store is opened again.

    Raises
    ------
    MissingExtraError
        If the package that reaches such URLs is not installed.
    ResultStoreError
        As for `ResultStore`, and if the object store cannot be reached or refuses. A file that could not be uploaded
        is kept, and the message says where.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self._url = url
        with _reaching(url):
            self._remote, self._root = fsspec.core.url_to_fs(url)
        local = Path(tempfile.mkdtemp(prefix="longthink-store-"))
        self._cleanup = weakref.finalize(self, shutil.rmtree, local, ignore_errors=True)
        with _reaching(url):
            names = self._download(local)
        if create and MARKER not in names:
            refuse_foreign(url, names)
        super().__init__(local, create=create)
        if MARKER not in names:
            self._upload([self.folder / MARKER])

    @property
    def place(self) -> str:
        return self._url

    @property
    def name(self) -> str:
        return self.place.rstrip("/").rpartition("/")[2]

    def add(self, *records: Record) -> list[Path]:
        files = super().add(*records)
        self._upload(files)
        return files

    def _download(self, local: Path) -> set[str]:
        """Fetch what belongs to a store; return the names at its top."""
        self._remote.invalidate_cache()  # another store of this process may have listed it
        paths = {path.removeprefix(self._root).lstrip("/"): path for path in self._remote.find(self._root)}
        ours = {
            name: path for name, path in paths.items() if name == MARKER or name.partition("/")[0] in TABLES
        }
        for table in TABLES:
            (local / table).mkdir()
        if ours:
            self._remote.get([*ours.values()], [str(local / name) for name in ours])
        return {name.partition("/")[0] for name in paths}

    def _upload(self, files: list[Path]) -> None:
        try:
            with _reaching(self.place):
                for file in files:
                    name = file.relative_to(self.folder).as_posix()
                    self._remote.put_file(str(file), f"{self._root}/{name}")
        except ResultStoreError as error:
            self._cleanup.detach()
            raise ResultStoreError(
                f"{error}; what was not uploaded is in {self.folder}, a store that can be copied there"
            ) from error


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:  # fsspec knows the kind of URL, and the package for it
        raise MissingExtraError(f"{url}: {error}") from error
    except (OSError, ValueError) as error:
        raise ResultStoreError(f"{url} cannot be reached: {' '.join(str(error).split())[:300]}") from error
