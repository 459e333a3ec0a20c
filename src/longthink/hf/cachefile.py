"""The file of a saved cache: tensors, a JSON object and a checksum over both, in the safetensors format.

Nothing is pickled. Damage is noticed here; whether the contents make sense is for `longthink.hf.saving` to check.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longthink._version import __version__
from longthink.errors import CacheFileError
from longthink.files import replacing

FORMAT = "longthink.cache"
FORMAT_VERSION = 1


def write_cache_file(path: Path, contents: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a whole file, or leave the old one.

    Raises
    ------
    CacheFileError
        If it cannot be written.
    """
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "longthink": __version__,
        "contents": json.dumps(contents),
    }
    metadata["sha256"] = checksum(metadata, on_host)
    try:
        with replacing(path) as temporary:
            save_file(on_host, temporary, metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CacheFileError(
            f"cannot write the cache to {str(path)!r}: {reason}. A file that was there before is unchanged"
        ) from error


def read_cache_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the JSON object and the tensors, on the host.

    Raises
    ------
    CacheFileError
        If the file is damaged, or not of this format and version.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise CacheFileError(f"found format={metadata.get('format')!r}, expected {FORMAT!r}")
        version = metadata.get("format_version")
        if version != str(FORMAT_VERSION):
            raise CacheFileError(
                f"found format version {version}, written by longthink {metadata.get('longthink')}: longthink "
                f"{__version__} reads version {FORMAT_VERSION}"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if metadata.pop("sha256", None) != checksum(metadata, tensors):
        raise CacheFileError("the checksum does not match: the file is damaged or was edited")
    try:
        contents = json.loads(metadata.get("contents", ""))
    except (ValueError, RecursionError) as error:
        raise CacheFileError(f"contents are not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise CacheFileError(f"found contents of type {type(contents).__name__}, expected a JSON object")
    return contents, tensors


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Raise errors of reading as `CacheFileError` that names the file."""
    try:
        yield
    except OSError as error:
        raise CacheFileError(f"cannot read the cache {str(path)!r}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CacheFileError(f"{str(path)!r} is damaged or not a safetensors file: {error}") from error
    except CacheFileError as error:
        raise CacheFileError(f"cache file {str(path)!r}: {error}") from error.__cause__


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the metadata and of names, shapes, dtypes and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
