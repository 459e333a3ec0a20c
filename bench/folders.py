"""What is made once and cached: the random models, and the virtual environments of peers."""

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

REQUIREMENTS = Path(__file__).parent / "peers" / "requirements"
"""One file of pinned packages per environment."""
_UNWANTED = {"openvino": ("torchvision",)}
"""Packages that others pull in and that break what we need: optimum exports no language model with torchvision."""
_COMPLETE = ".longthink-made"


def cache_folder() -> Path:
    """Return ``longthink/peers`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).resolve() / "longthink" / "peers"


def model_folder(name: str) -> Path:
    """Return a folder with the weights of a random model (safetensors), made from a fixed seed if it is missing."""
    folder = cache_folder() / "models" / hashlib.sha256(name.encode()).hexdigest()[:12]
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            bench_model(name, device="cpu").model.save_pretrained(Path(unfinished) / "model")
            shutil.rmtree(folder, ignore_errors=True)
            (Path(unfinished) / "model").rename(folder)
    return folder


def interpreter(environment: str, report: Callable[[str], None] = lambda text: None) -> Path:
    """Return the interpreter of an environment (a file in `REQUIREMENTS`), made at the first call (minutes, some GB).

    Raises
    ------
    BenchError
        If it cannot be made, for example without a network; the message names the packages and the folder.
    """
    pins = REQUIREMENTS / f"{environment}.txt"
    digest = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache_folder() / "environments" / f"{environment}-{digest}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / _COMPLETE).exists():
        return python
    report(f"installing {environment}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        for command in _commands(environment, folder, python, pins):
            subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().rpartition("\n")[2]
        wanted = ", ".join(line for line in pins.read_text().splitlines() if line and line[0] != "#")
        raise BenchError(
            f"cannot make the environment {environment!r} in {folder} ({last}): it needs a package index once, "
            f"for {wanted}"
        ) from error
    (folder / _COMPLETE).touch()
    return python


def _commands(environment: str, folder: Path, python: Path, pins: Path) -> list[list[str]]:
    """Return the commands that make an environment: uv where it is on PATH, venv and pip elsewhere."""
    if uv := shutil.which("uv"):
        make = [uv, "venv", "--python", sys.executable, str(folder)]
        pip, target, yes = [uv, "pip"], ["--python", str(python)], []
    else:
        make = [sys.executable, "-m", "venv", str(folder)]
        pip, target, yes = [str(python), "-m", "pip"], [], ["--yes"]
    commands = [make, [*pip, "install", *target, "-r", str(pins)]]
    if unwanted := _UNWANTED.get(environment):
        commands.append([*pip, "uninstall", *target, *yes, *unwanted])
    return commands
