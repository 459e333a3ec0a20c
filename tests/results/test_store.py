"""What is added is there, once, typed, whatever happens to the processes; what does not belong is named."""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from longthink.errors import ResultStoreError
from longthink.files import STALE_S
from longthink.lab.results.records import Sample, to_row
from longthink.lab.results.schema import arrow_schema
from longthink.lab.results.store import ResultStore
from tests.results.making import make_measurement, make_sample

ROOT = Path(__file__).parents[2]
whole = st.integers(-(2**63), 2**63 - 1)
number = st.floats(allow_nan=False, allow_infinity=False)
samples = st.builds(
    make_sample,
    problem=st.text(max_size=2),
    sample=st.integers(0, 1),
    text=st.text(),
    answer=st.none() | st.text(),
    seconds=number,
    evicted=whole,
    ms_per_token_late=st.none() | number,
    budget=st.none() | whole,
    correct=st.booleans(),
)
measurements = st.builds(
    make_measurement, run=st.sampled_from("ab"), decode_tokens=st.integers(0, 2), rss_bytes=st.none() | whole
)


def key(record):
    return (record.table, *(getattr(record, name) for name in record.key))


def stored(folder, table="samples"):
    """Keys of a table, by a store opened afresh."""
    found = ResultStore(folder, create=False).query(f"SELECT problem, sample FROM {table}")
    return sorted((row["problem"], row["sample"]) for row in found)


def child(code, *arguments, **options):
    """Start a real process that runs a piece of code."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(samples | measurements, max_size=4), max_size=4), st.booleans())
def test_round_trip_keeps_the_first_of_each_key(batches, compact):
    first = {}
    with tempfile.TemporaryDirectory() as folder:
        for batch in batches:
            ResultStore(folder).add(*batch)
            for record in batch:
                first.setdefault(key(record), record)
        store = ResultStore(folder)
        if compact:
            store.compact()
        for table in ("samples", "measurements"):
            wanted = [to_row(record) for record in first.values() if record.table == table]
            rows = store.query(f"SELECT * FROM {table}")
            assert sorted(map(repr, rows)) == sorted(map(repr, wanted))


def test_done_tells_setups_apart(tmp_path):
    store = ResultStore(tmp_path / "a" / "store")
    one, other = make_sample(problem="p1", sample=2), make_sample(problem="p1", seed=1)
    store.add(one, other)
    assert store.done(Sample, one.config) == {("p1", 2)}
    assert store.done(Sample, other.config) == {("p1", 0)}
    assert store.done(Sample, "none") == set()


def test_a_folder_that_was_dropped_because_it_was_empty_comes_back(tmp_path):
    ResultStore(tmp_path)
    (tmp_path / "samples").rmdir()
    store = ResultStore(tmp_path, create=False)
    assert stored(tmp_path) == []
    store.add(make_sample())
    assert stored(tmp_path) == [("p0", 0)]


def test_parameters_in_turn_and_by_name(tmp_path):
    store = ResultStore(tmp_path)
    store.add(make_sample(problem="it's"), make_sample(problem="b"))
    assert store.query("SELECT problem FROM samples WHERE problem = ?", ["it's"]) == [{"problem": "it's"}]
    assert store.query("SELECT count(*) AS n FROM samples WHERE problem <> $p", {"p": "b"}) == [{"n": 1}]


def test_compaction_merges_and_leaves_full_files_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("longthink.lab.results.store.FILE_ROWS", 10)
    store = ResultStore(tmp_path)
    store.add(*(make_sample(problem=f"big{i}", text="first") for i in range(10)))
    (big,) = (tmp_path / "samples").iterdir()
    for i in range(8):
        store.add(make_sample(problem=f"big{i}", text="second"), make_sample(problem=f"small{i}"))
    left = tmp_path / "samples" / ".left-1-00.tmp"
    fresh = tmp_path / "samples" / ".fresh-1-00.tmp"
    for path in (left, fresh):
        path.write_text("half")
    old = time.time() - STALE_S - 60
    subprocess.run(["touch", "-d", f"@{old}", left], check=True)
    for _ in range(3):
        store.compact()
    names = [path.name for path in sorted((tmp_path / "samples").glob("*.parquet"))]
    assert names[0] == big.name
    assert len(names) == 2
    assert (left.exists(), fresh.exists()) == (False, True)
    rows = store.query("SELECT problem, text FROM samples")
    assert len(rows) == 18
    assert {row["text"] for row in rows if row["problem"].startswith("big")} == {"first"}


def test_what_follows_a_compaction_comes_later(tmp_path):
    store = ResultStore(tmp_path)
    for text in ("first", "second"):
        store.add(make_sample(problem="p", text=text), make_sample(problem=text))
        store.compact()
    store.add(make_sample(problem="p", text="third"))
    for _ in range(2):
        assert store.query("SELECT text FROM samples WHERE problem = 'p'") == [{"text": "first"}]
        store.compact()


# Processes ------------------------------------------------------------------------------------------------------

ADDING = """
import sys
from longthink.lab.results.store import ResultStore
from tests.results.making import make_sample
store, name, count, every = ResultStore(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for i in range(count):
    store.add(make_sample(problem=f"{name}{i}"), make_sample(problem=f"shared{i}", text=name))
    print(i, flush=True)
    if every and i % every == every - 1:
        store.compact()
"""


@pytest.mark.slow
def test_many_processes_add_compact_and_read_at_once(tmp_path):
    folder = tmp_path / "store"
    writers = [child(ADDING, folder, name, 30, every) for name, every in (("a", 0), ("b", 7), ("c", 11))]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        if (folder / "longthink-store").exists():
            found = stored(folder)
            assert len(found) == len(set(found)) >= seen
            seen = len(found)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    names = [f"{who}{i}" for who in ("a", "b", "c", "shared") for i in range(30)]
    assert stored(folder) == sorted((name, 0) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 3])
def test_kill_among_adds_loses_nothing_added(tmp_path, every):
    confirmed = 0
    for turn in range(3):
        writer = child(ADDING, tmp_path / "store", f"turn{turn}-", 10_000, every)
        for _ in range(8 + turn):
            writer.stdout.readline()
        time.sleep(0.003 * turn)
        writer.send_signal(signal.SIGKILL)
        printed = 8 + turn + len(writer.stdout.readlines())
        writer.wait()
        confirmed += printed
        found = [problem for problem, _ in stored(tmp_path / "store") if problem.startswith("turn")]
        assert len(set(found)) == len(found)
        assert {f"turn{turn}-{i}" for i in range(printed)} <= set(found)
        # One more may have been written and not yet been said to be.
        assert len([name for name in found if name.startswith(f"turn{turn}-")]) <= printed + 1
    assert len(found) <= confirmed + 3


COMPACTING = """
import os, signal, sys
from pathlib import Path
from longthink.lab.results.store import ResultStore

calls = 0

def deadly(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

store = ResultStore(sys.argv[1])
os.fsync, os.replace, Path.unlink = deadly(os.fsync), deadly(os.replace), deadly(Path.unlink)
store.compact()
print(calls)
"""


@pytest.mark.slow
def test_kill_at_any_step_of_a_compaction(tmp_path):
    """Each step that changes the disk is, in its turn, the one before which the process dies."""
    original = tmp_path / "original"
    store = ResultStore(original)
    for i in range(3):
        store.add(make_sample(problem=f"p{i}"), make_sample(problem="shared", text=str(i)))
    wanted = stored(original)
    step, finished = 0, False
    while not finished:
        step += 1
        folder = tmp_path / f"step{step}"
        shutil.copytree(original, folder)
        process = child(COMPACTING, folder, step)
        finished = process.wait() == 0
        assert finished or process.returncode == -signal.SIGKILL
        for again in (False, True):
            if again:
                ResultStore(folder).compact()
            assert stored(folder) == wanted
            (row,) = ResultStore(folder).query("SELECT text FROM samples WHERE problem = 'shared'")
            assert row["text"] == "0"
        assert len(list((folder / "samples").glob("*.parquet"))) == 1
    assert step > 6


# What does not belong ---------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(ResultStoreError, match=r"holds something else \(photo.jpg\)"):
        ResultStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
    with pytest.raises(ResultStoreError, match=r"photo.jpg is not a folder"):
        ResultStore(tmp_path / "photo.jpg")


def test_a_missing_store_is_not_made_where_it_must_not(tmp_path):
    with pytest.raises(ResultStoreError, match="gone is not a result store"):
        ResultStore(tmp_path / "gone", create=False)
    assert not (tmp_path / "gone").exists()


def test_another_format_is_refused(tmp_path):
    ResultStore(tmp_path)
    (tmp_path / "longthink-store").write_text("2\n")
    with pytest.raises(ResultStoreError, match="format '2': allowed is '1'"):
        ResultStore(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": None}, r"Sample.sample=None must be int of 64 bits"),
        ({"sample": True}, r"Sample.sample=True must be int"),
        ({"sample": 2**63}, r"Sample.sample=9223372036854775808 must be int of 64 bits"),
        ({"correct": 1}, r"Sample.correct=1 must be bool"),
        ({"answer": 7}, r"Sample.answer=7 must be str or None"),
        ({"seconds": float("nan")}, r"Sample.seconds=nan must be finite"),
        ({"text": "\ud800"}, r"Sample.text holds half a character"),
    ],
)
def test_wrong_values_are_refused_and_nothing_is_added(tmp_path, change, message):
    store = ResultStore(tmp_path)
    with pytest.raises(ResultStoreError, match=message):
        store.add(make_sample(problem="good"), make_sample(**change))
    assert stored(tmp_path) == []


def test_an_object_that_is_no_record_is_refused(tmp_path):
    with pytest.raises(
        ResultStoreError, match="dict is not a record: allowed are Sample, Fidelity, Measurement"
    ):
        ResultStore(tmp_path).add({"problem": "p"})


def table_without(*names, **changes):
    rows = pa.Table.from_pylist([to_row(make_sample())], arrow_schema("samples"))
    for name, values in changes.items():
        rows = rows.drop_columns([name] if name in rows.column_names else []).append_column(name, values)
    return rows.drop_columns(list(names))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (table_without("gold", "seed"), "no column 'seed'; no column 'gold'"),
        (table_without(seconds=pa.array(["1"])), "column 'seconds' is string, must be double"),
        (table_without(colour=pa.array([1])), "unknown column 'colour'"),
    ],
)
def test_a_foreign_file_is_named(tmp_path, rows, message):
    store = ResultStore(tmp_path)
    store.add(make_sample())
    parquet.write_table(rows, tmp_path / "samples" / "guest.parquet")
    for use in (store.compact, lambda: store.done(Sample, "x")):
        with pytest.raises(ResultStoreError, match=r"guest\.parquet does not hold samples") as caught:
            use()
        assert message in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "empty"])
def test_a_damaged_file_is_named(tmp_path, damage):
    store = ResultStore(tmp_path)
    store.add(make_sample(text="qzxjkvbw"))
    (path,) = (tmp_path / "samples").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        # Another letter in a text, where only a checksum can tell.
        group = parquet.read_metadata(path).row_group(0)
        columns = map(group.column, range(group.num_columns))
        (text,) = (column for column in columns if column.path_in_schema == "text")
        assert content.count(b"qzxjkvbw") == 1
        assert content.index(b"qzxjkvbw") > text.data_page_offset
        content[content.index(b"qzxjkvbw")] ^= 1
    new = {"cut": content[:-20], "flip": content, "text": b"not a table", "empty": b""}[damage]
    path.write_bytes(new)
    for use in (ResultStore(tmp_path).compact, lambda: stored(tmp_path)):
        with pytest.raises(ResultStoreError) as caught:
            use()
        assert f"{path.name} is damaged" in str(caught.value)
    assert path.read_bytes() == new


def test_files_from_before_an_optional_column_stay_readable(tmp_path):
    store = ResultStore(tmp_path)
    store.add(make_sample(problem="new", ms_per_token_late=2.0))
    parquet.write_table(table_without("ms_per_token_late", "top_k"), tmp_path / "samples" / "0.parquet")
    for _ in range(2):
        rows = store.query("SELECT problem, ms_per_token_late AS late FROM samples ORDER BY problem")
        assert rows == [{"problem": "new", "late": 2.0}, {"problem": "p0", "late": None}]
        assert list(store.query("SELECT * FROM samples")[0]) == list(to_row(make_sample()))
        store.compact()
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_every_column_is_documented():
    page = (ROOT / "docs" / "store.md").read_text()
    parts = page.partition("## Columns of `measurements`")
    for text, record in ((parts[0], make_sample()), (parts[2], make_measurement())):
        assert [name for name in to_row(record) if f"`{name}`" not in text] == []
