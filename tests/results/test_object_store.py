"""A store under a URL: what is added is there for others, whole, and what is not let through is said and kept.

Files in memory stand for an object store; with s3fs and moto installed, a real S3 server is asked as well.
"""

import shutil
import subprocess
import sys
from importlib.util import find_spec

import fsspec
import pytest

from longthink.cli.app import main
from longthink.errors import MissingExtraError, ResultStoreError
from longthink.lab.results.object_store import open_store
from longthink.lab.results.store import MARKER, ResultStore
from tests.results.making import make_measurement, make_sample


@pytest.fixture
def url():
    yield "memory://bucket/results"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.fixture(scope="module")
def s3():
    if find_spec("s3fs") is None or find_spec("moto") is None:
        pytest.skip("needs s3fs and moto[s3,server]")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stderr=subprocess.PIPE, text=True
    )
    with pytest.MonkeyPatch.context() as patch:
        address = next(word for line in server.stderr for word in line.split() if word.startswith("http://"))
        for name, value in (("AWS_ACCESS_KEY_ID", "testing"), ("AWS_SECRET_ACCESS_KEY", "testing"),
                            ("AWS_ENDPOINT_URL", address), ("AWS_DEFAULT_REGION", "us-east-1")):  # fmt: skip
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket/deep/results"
    server.kill()
    server.wait()


def problems(store):
    return sorted(row["problem"] for row in store.query("SELECT problem FROM samples"))


def check_what_is_added_is_there(url):
    first, second = open_store(url), open_store(url)
    first.add(make_sample(problem="a"), make_measurement())
    second.add(make_sample(problem="b"))
    second.add(make_sample(problem="a", text="later"))
    assert problems(first) == ["a"], "what others add is seen by the next one"
    third = open_store(url, create=False)
    assert problems(third) == ["a", "b"]
    assert third.query("SELECT text FROM samples WHERE problem = 'a'")[0]["text"] != "later", (
        "the first one counts"
    )
    assert third.query("SELECT count(*) AS n FROM measurements")[0]["n"] == 1
    assert (third.place, third.name) == (url, "results")
    third.compact()
    third.add(make_sample(problem="c"))
    assert problems(third) == problems(open_store(url)) == ["a", "b", "c"]


def test_what_is_added_is_there_for_others(url):
    check_what_is_added_is_there(url)


def test_what_is_added_is_there_for_others_on_a_real_server(s3):
    check_what_is_added_is_there(s3)
    with pytest.raises(ResultStoreError, match=r"s3://nobody/results cannot be reached"):
        open_store("s3://nobody/results").add(make_sample())


def test_a_copy_of_it_is_a_store(url, tmp_path):
    open_store(url).add(make_sample(problem="a"))
    fsspec.filesystem("memory").get("/bucket/results", str(tmp_path), recursive=True)
    (folder,) = {path.parent for path in tmp_path.rglob(MARKER)}
    assert problems(ResultStore(folder, create=False)) == ["a"]


def test_its_local_copy_goes_with_it(url):
    store = open_store(url)
    folder = store.folder
    assert folder.is_dir()
    del store
    assert not folder.exists()


def test_what_cannot_be_a_store_is_refused(url):
    memory = fsspec.filesystem("memory")
    with pytest.raises(ResultStoreError, match=r"memory://bucket/none is not a result store"):
        open_store("memory://bucket/none", create=False)
    memory.pipe("/bucket/results/notes.txt", b"mine")
    with pytest.raises(ResultStoreError, match=r"holds something else \(notes.txt\)"):
        open_store(url)
    assert memory.cat("/bucket/results/notes.txt") == b"mine"
    memory.pipe(f"/bucket/results/{MARKER}", b"99\n")
    with pytest.raises(ResultStoreError, match=r"memory://bucket/results is a result store of format '99'"):
        open_store(url)
    with pytest.raises(ResultStoreError, match=r"nonsense://bucket cannot be reached: .*nonsense"):
        open_store("nonsense://bucket")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(MissingExtraError, match="adlfs"):
        open_store("abfs://bucket/results")


def test_what_could_not_be_uploaded_is_kept(url, monkeypatch):
    store = open_store(url)
    store.add(make_sample(problem="a"))

    def refuse(*paths):
        raise PermissionError("no more room")

    monkeypatch.setattr(type(store._remote), "put_file", refuse)
    with pytest.raises(
        ResultStoreError, match=r"no more room; what was not uploaded is in (.*), a store"
    ) as caught:
        store.add(make_sample(problem="b"))
    folder = store.folder
    assert str(folder) in str(caught.value)
    del store, caught
    assert problems(ResultStore(folder, create=False)) == ["a", "b"]
    shutil.rmtree(folder)


@pytest.mark.slow
def test_eval_and_report_take_a_url(url, tmp_path, capfd):
    command = [
        "eval",
        "--tasks",
        "reasoner/s/chain",
        "-n",
        "2",
        "--policies",
        "recall",
        "--budgets",
        "96",
        "--out",
    ]
    assert main([*command, url]) == 0
    assert f"2 samples made, 0 were there, all in {url}" in capfd.readouterr().err
    assert main([*command, url]) == 0
    assert "0 samples made, 2 were there" in capfd.readouterr().err
    assert main(["report", url]) != 0
    assert "--out is needed" in capfd.readouterr().err
    assert main(["report", url, "--out", str(tmp_path)]) == 0
    assert "Report of results" in (tmp_path / "report.html").read_text()
