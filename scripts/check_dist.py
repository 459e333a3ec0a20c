"""Check that the two wheels and the sdist in a folder hold what they must and nothing else: check_dist.py FOLDER."""

import sys
import tarfile
import zipfile
from pathlib import Path

WEIGHTS = "longthink/reasoner/weights/"
LAB = "longthink/lab/"
MAX_MB = 16


def wheel_faults(names):
    """Say what is wrong with the core's file names, one line per fault."""
    faults = []
    weights = {name.removeprefix(WEIGHTS) for name in names if name.startswith(WEIGHTS)}
    for wanted in ("config.json", ".safetensors", "tokenizer"):
        if not any(wanted in name for name in weights):
            faults.append(f"no {wanted} in {WEIGHTS}")
    for wanted in ("longthink/__init__.py", "longthink/py.typed"):
        if wanted not in names:
            faults.append(f"no {wanted}")
    if not any(name.endswith("entry_points.txt") for name in names):
        faults.append("no entry points")
    if any(name.startswith(LAB) for name in names):
        faults.append("holds the laboratory")
    return faults + common_faults(names, "longthink")


def lab_faults(names):
    """Say what is wrong with the laboratory's file names, one line per fault."""
    return common_faults(names, "longthink/lab")


def common_faults(names, package):
    faults = [] if any(name.endswith("licenses/LICENSE") for name in names) else ["no LICENSE"]
    strangers = [name for name in names if not name.startswith(f"{package}/") and ".dist-info/" not in name]
    return faults + [f"should not be there: {name}" for name in sorted(strangers)]


def split_faults(core, lab, sdist):
    """Say which files both wheels hold, and which of the sdist's package neither does."""
    package = {name.removeprefix("src/") for name in sdist if name.startswith("src/longthink/")}
    faults = [f"in both wheels: {name}" for name in sorted(set(core) & set(lab))]
    return faults + [f"in no wheel: {name}" for name in sorted(package - {*core, *lab})]


def sdist_faults(names):
    """Say what is wrong with an sdist's file names (without the leading folder), one line per fault."""
    wanted = (
        "pyproject.toml",
        "LICENSE",
        "CITATION.cff",
        "SECURITY.md",
        "constraints.txt",
        "examples/one_line.py",
        "lab/LICENSE",
        "lab/hatch_build.py",
        "lab/pyproject.toml",
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


def names_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def check(folder):
    """Return the faults of the two wheels and the one sdist in ``folder``."""
    (core,), (lab,) = folder.glob("longthink-*.whl"), folder.glob("longthink_lab-*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()]
    faults = [f"{core.name}: {fault}" for fault in wheel_faults(names_of(core))]
    faults += [f"{lab.name}: {fault}" for fault in lab_faults(names_of(lab))]
    faults += [f"{sdist.name}: {fault}" for fault in sdist_faults(names)]
    faults += split_faults(names_of(core), names_of(lab), names)
    for path in (core, lab, sdist):
        megabytes = path.stat().st_size / 1e6
        print(f"{path.name}: {megabytes:.1f} MB")
        if megabytes > MAX_MB:
            faults.append(f"{path.name}: {megabytes:.1f} MB, more than {MAX_MB}")
    return faults


if __name__ == "__main__":
    found = check(Path(sys.argv[1]))
    print("\n".join(found) or "complete")
    sys.exit(bool(found))
