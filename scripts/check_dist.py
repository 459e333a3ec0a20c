"""Check that the wheel and the sdist in a folder hold what they must and nothing else: check_dist.py FOLDER."""

import sys
import tarfile
import zipfile
from pathlib import Path

WEIGHTS = "longthink/reasoner/weights/"
MAX_MB = 16


def wheel_faults(names):
    """Say what is wrong with a wheel's file names, one line per fault."""
    faults = []
    weights = {name.removeprefix(WEIGHTS) for name in names if name.startswith(WEIGHTS)}
    for wanted in ("config.json", ".safetensors", "tokenizer"):
        if not any(wanted in name for name in weights):
            faults.append(f"no {wanted} in {WEIGHTS}")
    for wanted in ("longthink/__init__.py", "longthink/py.typed"):
        if wanted not in names:
            faults.append(f"no {wanted}")
    if not any(name.endswith("licenses/LICENSE") for name in names):
        faults.append("no LICENSE")
    if not any(name.endswith("entry_points.txt") for name in names):
        faults.append("no entry points")
    strangers = {name.split("/")[0] for name in names if not name.startswith(("longthink/", "longthink-"))}
    faults += [f"should not be there: {name}" for name in sorted(strangers)]
    return faults


def sdist_faults(names):
    """Say what is wrong with an sdist's file names (without the leading folder), one line per fault."""
    wanted = (
        "pyproject.toml",
        "LICENSE",
        "constraints.txt",
        "Makefile",
        "bench/peers/requirements/kvpress.txt",
        "scripts/setup.sh",
        "tests/test_house.py",
        "tools/train_reasoner/__main__.py",
    )
    faults = [f"no {name}" for name in wanted if name not in names]
    if not any(name.startswith("src/" + WEIGHTS) for name in names):
        faults.append("no weights")
    return faults


def check(folder):
    """Return the faults of the one wheel and the one sdist in ``folder``."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        faults = [f"{wheel.name}: {fault}" for fault in wheel_faults(archive.namelist())]
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    faults += [f"{sdist.name}: {fault}" for fault in sdist_faults(names)]
    for path in (wheel, sdist):
        megabytes = path.stat().st_size / 1e6
        print(f"{path.name}: {megabytes:.1f} MB")
        if megabytes > MAX_MB:
            faults.append(f"{path.name}: {megabytes:.1f} MB, more than {MAX_MB}")
    return faults


if __name__ == "__main__":
    found = check(Path(sys.argv[1]))
    print("\n".join(found) or "complete")
    sys.exit(bool(found))
