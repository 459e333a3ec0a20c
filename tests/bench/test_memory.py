"""Every system in a process of its own."""

import psutil
import pytest

from longthink.errors import BenchError
from longthink.lab.bench.memory import measure_memory
from tests.bench.conftest import PER_TOKEN


@pytest.mark.slow
def test_bytes_of_real_processes(plan):
    told = []
    chosen = plan(policies=("raas",), baselines=("dynamic",), fast_forward=False, rows=2)
    rows = list(measure_memory(chosen, lambda done, name: told.append(done)))
    assert [(row.system, row.decode_tokens) for row in rows] == [
        (name, n) for name in ("hf dynamic", "raas") for n in (0, 96, 200)
    ]
    kept = {(row.system, row.decode_tokens): row for row in rows}
    assert [kept["raas", n].kv_bytes for n in (0, 96, 200)] == [2 * 96 * PER_TOKEN] * 3
    assert [kept["hf dynamic", n].kv_bytes for n in (0, 96, 200)] == [
        2 * (20 + n) * PER_TOKEN for n in (0, 96, 200)
    ]
    assert told == sorted(told) and told[-1] == len(rows)
    for row in rows:
        # The process has torch and transformers in it.
        assert row.rss_bytes > 50 * 2**20
        assert (row.kind, row.device_bytes, row.ms_per_token, row.seconds) == ("memory", None, None, None)
        assert not row.fast_forwarded
    assert len({row.run for row in rows}) == 2
    assert len({row.run.partition("/")[0] for row in rows}) == 1


@pytest.mark.slow
def test_resident_memory_is_what_the_process_really_holds(plan):
    """A dense cache of some 60 MiB is seen in the process; a bounded one of some 4 MiB is not more than that."""
    big = "random:layers=2,hidden=32,heads=8,kv_heads=8,head_dim=64"
    chosen = plan(model=big, policies=("raas",), baselines=("dynamic",), lengths=(64, 8000))
    grown = {}
    for row in measure_memory(chosen):
        grown.setdefault(row.system, []).append((row.rss_bytes, row.kv_bytes))
    rss, held = [late - early for early, late in zip(*grown["hf dynamic"][1:], strict=True)]
    assert held > 60 * 2**20
    assert rss > 0.9 * held
    (before, _), (after, bounded) = grown["raas"][1:]
    assert bounded < 2**20
    assert after - before < 0.3 * held


@pytest.mark.slow
def test_a_process_that_fails_says_why(plan):
    with pytest.raises(BenchError, match=r"measuring 'raas' failed: .*there is no such folder"):
        list(measure_memory(plan(model="./nowhere", policies=("raas",), baselines=())))


@pytest.mark.slow
def test_who_stops_listening_leaves_no_process_behind(plan, monkeypatch):
    from longthink.lab.bench import memory

    started = []

    class Watched(memory.Child):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(psutil.Process(self.pid))

    monkeypatch.setattr(memory, "Child", Watched)
    rows = measure_memory(plan(policies=("raas",), baselines=(), lengths=(100_000,), fast_forward=False))
    next(rows)
    assert started[0].is_running()
    rows.close()
    assert not started[0].is_running()
