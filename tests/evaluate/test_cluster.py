"""Sweeps on a real Ray cluster of two nodes: a worker is killed, a node is lost, stores of machines come together."""

import os
import shutil
import signal
from functools import cache

import psutil
import pytest

from longthink.errors import SweepError
from longthink.lab.fidelity.plan import Plan
from longthink.lab.fidelity.sweep import FidelitySweep
from longthink.lab.results.store import ResultStore
from longthink.lab.work.workers import run_work
from tests.evaluate.sweeps import made, raw_keys, short_sweep

ray = pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = pytest.mark.slow


# Before there is a cluster, which stays until the last test.
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
    # Another process of the tests may have a cluster just now.
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", cache(set))
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
    with pytest.raises(SweepError, match=message):
        run_work(short_sweep(tmp_path / "store"), ray=address)


@pytest.fixture(scope="module")
def started():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def cluster(started):
    """The cluster with two nodes, whatever a test before has done to the second one."""
    if not started.worker_nodes:
        started.add_node(num_cpus=1)
    return started


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


def reading(folder, said):
    """A measurement of fidelity of ten texts under two policies."""
    plan = Plan(
        tasks=("reasoner/s/chain",), count=10, max_tokens=60, policies=("raas", "recency"), decode_budgets=(16,),
        rows=1,
    )  # fmt: skip
    return FidelitySweep(plan, plan.load_texts(), ResultStore(folder), say=said.append)


@pytest.mark.parametrize("kind", ["eval", "fidelity"])
def test_a_lost_node_costs_what_it_had_in_flight_and_no_more(cluster, tmp_path, kind):
    """The node goes with all its processes in the middle of its work; the other one does the rest."""
    said, places = [], []
    if kind == "eval":
        work = short_sweep(tmp_path / "ray", said=said, policies="recency,raas")
    else:
        work = reading(tmp_path / "ray", said)

    def lose_one(driver):
        places.append(len(shard_processes()))
        if driver.total.made >= 3 and places[-1] == 2 and len(cluster.worker_nodes) == 1:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    work.report = lose_one
    run_work(work, ray=cluster.address)
    assert len(cluster.worker_nodes) == 0, "the node should have been lost"
    assert (work.total.made, work.is_complete) == (20, True)
    assert work.lost_workers >= 1 and "in flight are done again by others" in said[0]
    table, key = ("samples", "problem, sample") if kind == "eval" else ("fidelity", "text")
    rows = ResultStore(tmp_path / "ray", create=False).query(f"SELECT config, {key} FROM {table}")
    assert len(rows) == 20
    if kind == "fidelity":
        run_work(alone := reading(tmp_path / "here", said))
        assert kept(work) == kept(alone)


def kept(work):
    """What does not depend on time, of every record."""
    return work.store.query(
        "SELECT config, text, tokens, round(nll, 2) AS nll, round(kl, 2) AS kl, evicted, kv_bytes "
        "FROM fidelity ORDER BY config, text"
    )


def test_stores_of_several_machines_come_together_by_copying(tmp_path):
    """Files have names of their own, and a row that two machines made counts once."""
    run_work(short_sweep(tmp_path / "one", count=3, policies="recency"))
    run_work(short_sweep(tmp_path / "two", count=2, policies="recency,raas"))
    together = tmp_path / "together"
    for machine in ("one", "two"):
        shutil.copytree(tmp_path / machine, together, dirs_exist_ok=True)
    assert sum(raw_keys(together).values()) == 3 + 4
    assert len(made(together)) == 5
    rest = short_sweep(together, count=3, policies="recency,raas")
    run_work(rest)
    assert (rest.total.stored, rest.total.made) == (5, 1)


def test_an_error_of_a_task_is_the_error_of_the_sweep(cluster, tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        run_work(short_sweep(tmp_path / "store", model=str(tmp_path / "gone")), ray=cluster.address)
