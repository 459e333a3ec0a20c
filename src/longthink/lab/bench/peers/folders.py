"""What is made once and kept: the random models, and the virtual environments of the peers."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from longthink.errors import BenchError
from longthink.lab.bench.models import bench_model

REQUIREMENTS = Path(__file__).parent / "requirements"
"""A file of pinned packages for each environment."""
_UNWANTED = {"openvino": ("torchvision",)}
"""Packages that others bring along and that break what we need: optimum exports no language model beside it."""
_MADE = ".longthink-made"


def cache_folder() -> Path:
    """Return where models and environments are kept: ``longthink/peers`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "longthink" / "peers"


def model_folder(name: str) -> Path:
    """Return a folder with the weights of a random model (safetensors), made from a fixed seed if it is not there."""
    folder = cache_folder() / "models" / hashlib.sha256(name.encode()).hexdigest()[:12]
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            bench_model(name, device="cpu").model.save_pretrained(Path(unfinished) / "model")
            shutil.rmtree(folder, ignore_errors=True)
            (Path(unfinished) / "model").rename(folder)
    return folder


def interpreter(environment: str, told: Callable[[str], None] = lambda text: None) -> Path:
    """Return the interpreter of an environment; it is made at the first call (minutes, some GB).

    Parameters
    ----------
    environment
        Name of a file in `REQUIREMENTS`.
    told
        Called with what goes on.

    Raises
    ------
    BenchError
        If it cannot be made, as without a network; the message says what is to be installed and where.
    """
    pins = REQUIREMENTS / f"{environment}.txt"
    mark = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache_folder() / "environments" / f"{environment}-{mark}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / _MADE).exists():
        return python
    told(f"installing {environment}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        for command in _commands(environment, folder, python, pins):
            subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().rpartition("\n")[2]
        wanted = ", ".join(line for line in pins.read_text().splitlines() if line and line[0] != "#")
        raise BenchError(
            f"the environment {environment!r} could not be made ({last}). It needs a package index once, for: "
            f"{wanted}. Its place is {folder}"
        ) from error
    (folder / _MADE).touch()
    return python


def _commands(environment: str, folder: Path, python: Path, pins: Path) -> list[list[str]]:
    """What makes an environment: uv where it is on PATH, venv and pip elsewhere."""
    unwanted = list(_UNWANTED.get(environment, ()))
    if uv := shutil.which("uv"):
        make = [uv, "venv", "--python", sys.executable, str(folder)]
        pip, yes = [uv, "pip"], []
        at = ["--python", str(python)]
    else:
        make = [sys.executable, "-m", "venv", str(folder)]
        pip, yes, at = [str(python), "-m", "pip"], ["--yes"], []
    commands = [make, [*pip, "install", *at, "-r", str(pins)]]
    if unwanted:
        commands.append([*pip, "uninstall", *at, *yes, *unwanted])
    return commands
