"""One tree, two wheels: the cache, and the laboratory that measures it. Built here, and run from where they unpack.

They are unpacked into folders of a test and put on the path of an interpreter that has what they depend on.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import longthink
from longthink.cli.app import LABORATORY

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
CHECK = ROOT / "scripts" / "check_dist.py"


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Folder with both wheels and the sdist."""
    return built(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheels(dist):
    """The core's wheel and the laboratory's."""
    (core,), (lab,) = dist.glob("longthink-*.whl"), dist.glob("longthink_lab-*.whl")
    return core, lab


@pytest.fixture
def install(tmp_path):
    """Unpack wheels; returns a function that runs ``longthink`` from there and nowhere else."""

    def unpack(*wheels):
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(tmp_path / "site")

        def run(*words):
            check = f"import longthink; assert longthink.__file__.startswith({str(tmp_path)!r})"
            code = f"{check}; import sys; from longthink.cli import main; sys.exit(main({list(words)!r}))"
            environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "100"}
            return subprocess.run(
                [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
            )

        return run

    return unpack


def built(checkout, folder):
    """Build both wheels and the sdist of a checkout into a folder."""
    for place, targets in ((checkout, ("sdist", "wheel")), (checkout / "lab", ("wheel",))):
        words = [word for target in targets for word in ("-t", target)]
        command = [sys.executable, "-m", "hatchling", "build", *words, "-d", str(folder)]
        subprocess.run(command, cwd=place, check=True, capture_output=True)
    return folder


def checked(folder):
    return subprocess.run([sys.executable, str(CHECK), str(folder)], capture_output=True, text=True)


def test_together_they_hold_the_tree_and_no_file_twice(dist, wheels):
    done = checked(dist)
    assert done.returncode == 0, done.stdout
    core, lab = ({*zipfile.ZipFile(wheel).namelist()} for wheel in wheels)
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert {name for name in core | lab if name.endswith(".py")} == modules
    assert core & lab == set()


def test_the_same_tree_gives_the_same_bytes(dist, tmp_path):
    """From the unpacked sdist, elsewhere, later and with another umask: as an index's user would check it."""
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "tree", filter="data")
    (tree,) = (tmp_path / "tree").iterdir()
    for path in tree.rglob("*.py"):
        path.chmod(0o600)
        os.utime(path, (1e9, 1e9))
    again = built(tree, tmp_path / "again")
    hashes = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in (dist, again)
    ]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 3


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda core, lab: core.pop("longthink/reasoner/weights/model.safetensors"), "no .safetensors"),
        (
            lambda core, lab: lab.pop("longthink/lab/report/page.py"),
            "in no wheel: longthink/lab/report/page.py",
        ),
        (lambda core, lab: lab.update({"longthink/lab/x.pyc": b""}) or core.update(lab), "in both wheels"),
        (lambda core, lab: lab.update({"lab/x.py": b""}), "should not be there: lab/x.py"),
    ],
)
def test_the_check_sees(dist, wheels, tmp_path, change, fault):
    contents = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    change(*contents)
    for wheel, files in zip(wheels, contents, strict=True):
        with zipfile.ZipFile(tmp_path / wheel.name, "w") as copy:
            for name, data in files.items():
                copy.writestr(name, data)
    for sdist in dist.glob("*.tar.gz"):
        shutil.copy(sdist, tmp_path)
    done = checked(tmp_path)
    assert done.returncode == 1
    assert fault in done.stdout


def test_the_laboratory_wants_the_core_of_its_version(wheels):
    described = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            described.append(HeaderParser().parsestr(archive.read(name).decode()))
    core, lab = described
    assert core["Version"] == lab["Version"] == longthink.__version__
    assert f"longthink=={longthink.__version__}" in lab.get_all("Requires-Dist")
    assert core["Requires-Python"] == lab["Requires-Python"]
    assert core["License-Expression"] == lab["License-Expression"]
    assert "longthink-lab[report]; extra == 'report'" in core.get_all("Requires-Dist")


def test_the_core_alone_names_what_is_missing(wheels, install):
    run = install(wheels[0])
    for command, (_, extra) in LABORATORY.items():
        done = run(command, "--tasks", "reasoner/s", "-n", "1")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"longthink: {command} belongs to the laboratory, which is not installed: "
            f'pip install "longthink[{extra}]"\n'
        )
    done = run("--help")
    listed = done.stdout.partition("Not installed")[2]
    assert done.returncode == 0
    assert [name for name in LABORATORY if name not in listed] == []


def test_the_core_alone_calibrates_a_policy_and_generates_with_it(wheels, install, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a = b + 3; b = 4"}\n')
    run = install(wheels[0])
    done = run("calibrate", "reasoner", "--data", "texts.jsonl", "--out", "stats.safetensors")
    assert done.returncode == 0, done.stderr
    policy = "tri_attention:stats=stats.safetensors"
    done = run("generate", "--policy", policy, "--decode-budget", "64", "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_both_run_the_laboratory(wheels, install):
    run = install(*wheels)
    done = run("eval", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--budgets" in done.stdout
    assert "Not installed" not in run("--help").stdout
