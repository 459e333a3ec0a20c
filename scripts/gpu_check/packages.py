"""Packages that the check imports, and their installation from wheels on a machine without a network."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

REQUIRED = ("torch", "transformers", "triton", "numpy", "safetensors", "tokenizers")
"""Packages that must be installed: they are large, or specific to the machine."""
WHEELS = {
    "pytest": "pytest",
    "pluggy": "pluggy",
    "iniconfig": "iniconfig",
    "pygments": "pygments",
    "packaging": "packaging",
    "typing_extensions": "typing-extensions",
}
"""Pure Python packages that can come as wheels, by import name: pytest with its dependencies, and what else longthink
imports without its command line."""


def missing(names: tuple[str, ...] | dict[str, str]) -> list[str]:
    return [name for name in names if find_spec(name) is None]


def has_gpu() -> bool:
    """Whether torch finds a GPU. Checked in a subprocess, so that this process does not occupy the GPU."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def install(folder: Path, target: Path) -> list[str]:
    """Install missing packages from a folder of wheels into `target`; return their names.

    Raises
    ------
    ValueError
        If a wheel is missing.
    """
    lacking = [WHEELS[name] for name in missing(WHEELS)]
    if lacking:
        options = "install --quiet --no-index --no-deps --no-compile".split()
        command = [sys.executable, "-m", "pip", *options]
        command += ["--find-links", str(folder.resolve()), "--target", str(target), *lacking]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(f"{folder} has no wheel of {', '.join(lacking)}: {done.stderr.strip()[-300:]}")
    return lacking


def download(folder: Path) -> float:
    """Download the wheels, on a machine with a network; return their size in MB."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), *WHEELS.values()], check=True)
    return sum(path.stat().st_size for path in folder.glob("*.whl")) / 1e6
