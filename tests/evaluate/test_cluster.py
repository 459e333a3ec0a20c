"""The sweep on a real Ray cluster of two nodes, one of whose workers is killed."""

import os
import signal

import psutil
import pytest

from longthink.errors import SweepError
from longthink.lab.work.workers import run_work
from tests.evaluate.sweeps import made, raw_keys, short_sweep

ray = pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    started.add_node(num_cpus=1)
    ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
    yield started
    ray.shutdown()
    started.shutdown()


def shard_processes():
    """Processes below this one in which Ray runs a shard."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "_shard" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_killed_worker_costs_what_it_had_in_flight_and_no_more(cluster, tmp_path):
    said = []
    sweep = short_sweep(tmp_path / "ray", said=said, policies="recency,raas")
    at_once = []

    def kill_one(sweep):
        shards = shard_processes()
        at_once.append(len(shards))
        if sweep.total.made >= 3 and not said and len(at_once) < 5:
            os.kill(shards[0].pid, signal.SIGKILL)

    sweep.report = kill_one
    run_work(sweep, ray=cluster.address)
    assert (sweep.total.made, sweep.is_complete) == (20, True)
    assert sweep.lost_workers >= 1 and "died" in said[0]
    assert max(at_once) == 2, "both nodes should have worked"
    assert set(raw_keys(tmp_path / "ray").values()) == {1}
    run_work(short_sweep(tmp_path / "here", policies="recency,raas"))
    assert made(tmp_path / "ray") == made(tmp_path / "here")


def test_an_error_of_a_task_is_the_error_of_the_sweep(cluster, tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        run_work(short_sweep(tmp_path / "store", model=str(tmp_path / "gone")), ray=cluster.address)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"no Ray cluster at '127\.0\.0\.1:1'"),
        ("host:port", "no Ray cluster at 'host:port'"),
        ("clutser", "ray='clutser' must be HOST:PORT, auto or local"),
        ("auto", "no Ray cluster at 'auto'"),
    ],
)
def test_no_cluster_is_said_in_words(tmp_path, monkeypatch, address, message):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SweepError, match=message):
        run_work(short_sweep(tmp_path / "store"), ray=address)
