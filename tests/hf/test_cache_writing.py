"""Writing the file of a cache: it appears as a whole, or the old file stays and an error says why."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import longthink
from tests.hf.test_cache_file import filled

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "cache"
    filled(model).save(path)
    return path


def test_a_full_disk_leaves_the_old_file(model, saved, tmp_path, monkeypatch):
    path = tmp_path / "cache"
    path.write_bytes(saved.read_bytes())
    cache = filled(model, lengths=(23, 23))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(longthink.CacheFileError, match=r"No space left on device.*unchanged") as caught:
            cache.save(path)
    assert isinstance(caught.value.__cause__, OSError)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # this one the kernel refuses
    try:
        with pytest.raises(longthink.CacheFileError, match=r"File too large.*unchanged"):
            cache.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == saved.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_an_interrupted_save_leaves_the_old_file(model, saved, tmp_path, monkeypatch):
    path = tmp_path / "cache"
    path.write_bytes(saved.read_bytes())

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        filled(model).save(path)
    assert path.read_bytes() == saved.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_a_place_that_cannot_be_written_to_is_named(model, tmp_path):
    cache, file = filled(model), tmp_path / "file"
    file.write_text("")
    with pytest.raises(
        longthink.CacheFileError, match=r"cannot write the cache to .*No such file or directory"
    ):
        cache.save(tmp_path / "no" / "cache")
    with pytest.raises(longthink.CacheFileError, match=r"cannot write the cache to .*Not a directory"):
        cache.save(file / "cache")
    with pytest.raises(longthink.CacheFileError, match="cannot write the cache to "):
        cache.save(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_named(model, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(longthink.CacheFileError, match=r"cannot write the cache to .*Permission denied"):
        filled(model).save(tmp_path / "cache")
    tmp_path.chmod(0o700)


SAVES_FOREVER = """
import os, sys, torch, longthink
from tests.models import build, prompt
torch.set_num_threads(1)  # a copy of this process has no other thread
model = build("qwen2")
caches = []
for tokens in (3000, 3001):
    cache = longthink.make_cache(model, policy="dense")
    with torch.no_grad():
        model(prompt((tokens,))[0], past_key_values=cache)
    caches.append(cache)
caches[0].save(sys.argv[1])
for line in sys.stdin:
    process = os.fork()
    while process == 0:
        for cache in caches:
            cache.save(sys.argv[1])
    print(process, flush=True)
    os.waitpid(process, 0)
    print("killed", flush=True)
"""
"""For each line that it reads, starts a process that saves until it is killed."""


@pytest.fixture
def saver(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", SAVES_FOREVER, str(tmp_path / "cache")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    ) as process:  # fmt: skip
        yield process


@pytest.mark.slow
def test_a_killed_save_leaves_a_file_that_loads(model, saver, tmp_path):
    path, lengths, halfway = tmp_path / "cache", [], 0
    for kill in range(16):
        if kill >= 4 and halfway:
            break  # on a busy machine it takes more tries
        saver.stdin.write("save\n")
        process = int(saver.stdout.readline())
        time.sleep(0.2 + 0.037 * kill)
        os.kill(process, signal.SIGKILL)
        assert saver.stdout.readline() == "killed\n"
        halfway += len(list(tmp_path.iterdir())) > 1
        with longthink.load_cache(model, path) as cache:
            lengths.append(cache.get_seq_length())
        for left in tmp_path.glob(".*"):
            left.unlink()
    assert set(lengths) <= {3000, 3001}
    assert halfway  # some were killed in the middle of writing
