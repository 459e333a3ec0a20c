"""What the check imports, and how a machine without a network gets what it lacks."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

THERE = ("torch", "transformers", "triton", "numpy", "safetensors", "tokenizers")
"""What must be installed: these are large, or made for one kind of machine."""
CARRIED = {
    "pytest": "pytest",
    "pluggy": "pluggy",
    "iniconfig": "iniconfig",
    "pygments": "pygments",
    "packaging": "packaging",
    "typing_extensions": "typing-extensions",
}
"""What may come as wheels of pure Python, by the name it is imported as: pytest with what it needs, and the rest of
what longthink imports where no command line is wanted."""


def missing(names: tuple[str, ...] | dict[str, str]) -> list[str]:
    """Return those that cannot be imported."""
    return [name for name in names if find_spec(name) is None]


def has_gpu() -> bool:
    """Whether torch sees a GPU; asked in another process, because a GPU is not for this one."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def install(folder: Path, target: Path) -> list[str]:
    """Install what is missing from wheels in a folder into a folder of its own, and return what that was.

    Raises
    ------
    ValueError
        If the wheels do not hold it.
    """
    lacking = [CARRIED[name] for name in missing(CARRIED)]
    if lacking:
        options = "install --quiet --no-index --no-deps --no-compile".split()
        command = [sys.executable, "-m", "pip", *options]
        command += ["--find-links", str(folder.resolve()), "--target", str(target), *lacking]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(f"{folder} does not bring {', '.join(lacking)}: {done.stderr.strip()[-300:]}")
    return lacking


def download(folder: Path) -> float:
    """Fill a folder with the wheels, on a machine that has a network; return their size in MB."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), *CARRIED.values()], check=True)
    return sum(path.stat().st_size for path in folder.glob("*.whl")) / 1e6
