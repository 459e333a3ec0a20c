"""The tool that breaks the code to see whether a test notices: its list fits the code, and nothing stays broken."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MUTATIONS = tomllib.loads((ROOT / "scripts" / "mutations.toml").read_text())
CODE = "def double(x):\n    return 2 * x + 0\n"
TESTS = """
import pytest
from longthink.numbers import double

def test_double():
    assert double(1) == 2

@pytest.mark.slow
def test_of_nothing():
    assert double(0) == 0
"""
LIST = """
[seen-at-once]
file = "numbers.py"
old = "2 * x"
new = "3 * x"
tests = ["tests/test_double.py"]

[seen-by-a-slow-test]
file = "numbers.py"
old = "2 * x + 0"
new = "x + 1"
tests = ["tests/test_double.py"]

[equal]
file = "numbers.py"
old = "+ 0"
new = "- 0"
tests = ["tests/test_double.py"]

[broken]
file = "numbers.py"
old = "return"
new = "retrn"
tests = ["tests/test_double.py"]

[absent]
file = "numbers.py"
old = "2 * x"
new = "3 * x"
tests = ["tests/test_absent.py"]
"""


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_list_fits_the_code(name):
    mutation = MUTATIONS[name]
    assert mutation.keys() == {"file", "old", "new", "tests"}
    text = (ROOT / "src" / "longthink" / mutation["file"]).read_text()
    assert text.count(mutation["old"]) == 1
    assert mutation["old"] != mutation["new"]
    for path in mutation["tests"]:
        assert (ROOT / path).is_file()


def git(folder, *words):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def run(checkout):
    command = [sys.executable, str(checkout / "scripts" / "mutate.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_survivors_are_named_and_files_put_back(tmp_path):
    for name, text in {
        "src/longthink/__init__.py": "",
        "src/longthink/numbers.py": CODE,
        "tests/test_double.py": TESTS,
        "scripts/mutations.toml": LIST,
        "pytest.ini": "[pytest]\nmarkers = slow\n",
        ".gitignore": "__pycache__\n.hypothesis\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "scripts" / "mutate.py", tmp_path / "scripts")
    git(tmp_path, "init", "-q"), git(tmp_path, "add", "-A"), git(tmp_path, "commit", "-qm", "all")
    done = run(tmp_path)
    assert done.returncode == 1, done.stderr
    at_once, by_slow, equal, broken, absent, total = done.stdout.splitlines()
    assert "test_double.py::test_double (quick" in at_once
    assert "test_double.py::test_of_nothing (slow" in by_slow
    assert equal == "| equal | SURVIVES |"
    assert broken == "| broken | NOT RUN: pytest ends with 2 |"
    # Such as tests of a package that is not installed, which conftest.py leaves out.
    assert absent == "| absent | NOT RUN: pytest ends with 4 |"
    assert total == "2 of 5 mutations were seen"
    assert (tmp_path / "src/longthink/numbers.py").read_text() == CODE
    (tmp_path / "src/longthink/numbers.py").write_text("mine")
    done = run(tmp_path)
    assert done.returncode != 0 and "has changes" in done.stderr
    assert (tmp_path / "src/longthink/numbers.py").read_text() == "mine"
