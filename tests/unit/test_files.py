"""A file is the old one or the new one, never half of it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from longthink.files import STALE_S, remove_stale, replacing, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_created_and_replaced(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("one ü", "two"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert names(tmp_path) == ["a.txt"]


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(error), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("ne")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


KILLED = """
import os, pathlib, signal, sys
from longthink.files import replacing
with replacing(pathlib.Path(sys.argv[1])) as temporary:
    temporary.write_text("ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_file_and_its_remains_go_in_time(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a.txt"])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == "old"
    remove_stale(tmp_path)
    (left,) = (name for name in names(tmp_path) if name != "a.txt")
    os.utime(tmp_path / left, (0, time.time() - STALE_S - 60))
    write_text(tmp_path / "b.txt", "another")
    assert left in names(tmp_path)
    write_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == ["a.txt", "b.txt"]
