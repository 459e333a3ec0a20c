"""Processes that measure peers: how they are talked to, what happens when they fail, and where they live."""

import sys
import venv
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import folders
from bench.client import Worker
from bench.folders import interpreter, model_folder
from bench.peers import measure
from bench.peers.measure import Results
from bench.peers.plan import BLOCK_STEPS, CONTROL, FLOOR, MIDDLE, WORKERS, PeersPlan, scenes
from bench.protocol import Job
from longthink.errors import BenchError
from longthink.lab.bench.models import bench_model
from longthink.lab.bench.plan import BLOCK
from tests.bench.conftest import MODEL

FAKE = "tests.bench.fake_worker"


def job(system):
    made = Job(system=system, folder="", context=1, budget=1, prompt=1, steps=1)
    return {"id": 0, "job": asdict(made)}


@pytest.fixture
def worker():
    with Worker(FAKE) as worker:
        yield worker


def test_a_worker_counts_its_own_cpu_time(worker):
    assert worker.call("versions") == {"pytest": pytest.__version__}
    times = {}
    for name in ("works", "sleeps"):
        worker.call("open", **job(name))
        times[name] = worker.call("decode", id=0, steps=7)["ms"]
        assert worker.call("close", id=0)["kv_bytes"] == 7
    assert times["works"] >= 50 > 25 > times["sleeps"]


def test_what_a_library_prints_is_not_taken_for_an_answer(worker):
    worker.call("open", **job("prints"))
    assert "ms" in worker.call("decode", id=0, steps=1)


def test_an_error_is_reported_and_the_worker_goes_on(worker):
    with pytest.raises(BenchError, match="'fake_worker': ValueError: not this one"):
        worker.call("open", **job("refuses"))
    with pytest.raises(BenchError, match="command='dance' must be versions, open, decode or close"):
        worker.call("dance")
    assert worker.call("open", **job("idles")).keys() == {"seconds"}


def test_a_worker_that_dies_says_its_last_words(worker):
    worker.call("open", **job("dies"))
    with pytest.raises(BenchError, match="ended with code 3: the last words"):
        worker.call("decode", id=0, steps=1)
    assert not worker.alive
    with pytest.raises(BenchError, match="ended with code 3"):
        worker.call("versions")


def test_another_environment_does_not_see_our_packages(tmp_path, monkeypatch):
    # Not even where PYTHONPATH names them.
    monkeypatch.setenv("PYTHONPATH", str(Path(torch.__file__).parents[1]))
    venv.create(tmp_path, with_pip=False, symlinks=True)
    with Worker("bench.peers.with_kvpress", tmp_path / "bin" / "python") as worker:
        with pytest.raises(BenchError, match="No module named 'torch'"):
            worker.call("versions")


# Rounds -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "OWN", FAKE)
    monkeypatch.setattr(measure, "model_folder", lambda name: tmp_path)
    for name in ("works", "idles", "dies", "refuses"):
        monkeypatch.setitem(WORKERS, name, (FAKE, "dies" if name == "dies" else ""))
    monkeypatch.setattr(measure, "interpreter", lambda name, report: sys.executable)


def plan(*peers, **changes):
    values = {"policies": (), "models": {"S2": MODEL}, "contexts": (MIDDLE,), "batches": (), "rounds": 3}
    return PeersPlan(peers=peers, **values | changes)


def test_systems_take_turns_and_the_first_block_does_not_count(fakes, monkeypatch):
    asked = []
    real = Worker.call

    def recorded(self, command, **values):
        asked.append((command, values.get("id"), values.get("steps")))
        return real(self, command, **values)

    monkeypatch.setattr(Worker, "call", recorded)
    found = Results()
    timed = list(measure.measure(plan("works", "idles"), found))
    decodes = [one for one in asked if one[0] == "decode"]
    assert [i for _, i, _ in decodes] == ["0/0", "0/1", "0/2"] * 4
    # All begin with a few steps, ours with those of whole pages, and then take what fits into a block's time.
    assert [steps for _, _, steps in decodes[:3]] == [4, 4, BLOCK]
    assert {steps for _, i, steps in decodes[3:] if i == "0/1"} == {BLOCK_STEPS}
    assert {steps % BLOCK for _, i, steps in decodes if i == "0/2"} == {0}
    assert [one.case.system for one in timed] == ["works", "idles", FLOOR]
    assert found.timings == timed and found.missing == {}
    for one in timed:
        low, middle, high = one.row.ms_per_token_low, one.row.ms_per_token, one.row.ms_per_token_high
        assert len(one.ms) == 3 and sorted(one.ms)[1] == middle
        assert min(one.ms) <= low <= middle <= high <= max(one.ms)
        assert (one.row.kind, one.row.model, one.row.decode_tokens) == ("peers", MODEL, MIDDLE - 128)
    assert len({(one.row.run, one.row.decode_tokens) for one in timed}) == 3


@pytest.mark.slow
def test_all_scenes_get_ready_before_the_first_is_timed(fakes, monkeypatch):
    asked = []
    real = Worker.send

    def recorded(self, command, **values):
        asked.append(command)
        return real(self, command, **values)

    monkeypatch.setattr(Worker, "send", recorded)
    places = {"contexts": (2048, MIDDLE), "rounds": 1}
    apart = [one.case for one in measure.measure(plan("works", **places), Results())]
    assert asked.index("decode") < len(asked) - 1 - asked[::-1].index("open")
    asked.clear()
    assert [one.case for one in measure.measure(plan("works", at_once=True, **places), Results())] == apart
    assert asked.index("decode") > len(asked) - 1 - asked[::-1].index("open")
    assert asked.count("open") == 4


def test_what_fails_is_missing_and_the_others_go_on(fakes):
    found = Results()
    timed = list(measure.measure(plan("refuses", "works", "dies"), found))
    assert [one.case.system for one in timed] == ["works", FLOOR]
    assert "not this one" in found.missing["refuses"]
    assert "the last words" in found.missing["dies"]
    assert all(len(one.ms) == 3 for one in timed)


def test_an_environment_that_cannot_be_made_is_tried_once(fakes, monkeypatch):
    tried = []

    def offline(name, report):
        tried.append(name)
        raise BenchError("no network")

    monkeypatch.setattr(measure, "interpreter", offline)
    found = Results()
    names = ("openvino f32", "openvino u8")
    timed = list(measure.measure(plan(*names, contexts=(2048, MIDDLE)), found))
    assert tried == ["openvino"]
    assert found.missing == dict.fromkeys(names, "no network")
    assert [one.case.system for one in timed] == [FLOOR, FLOOR]


def test_prompts_that_take_minutes_to_read_are_left_out():
    made = scenes(plan("hf static", "openvino f32", contexts=(MIDDLE, 32768)))
    assert [[case.system for case in scene.cases] for scene in made] == [
        ["hf static", "openvino f32", FLOOR],
        ["hf static", FLOOR],
    ]


def test_a_brief_model_is_measured_without_bookkeeping_and_narrow_keys_can_be_left_out():
    options = {"policies": ("dense", "raas", "milestone"), "narrow": False}
    made = scenes(plan("hf static", models={"S8": MODEL, "S2": MODEL}, brief=("S2",), **options))
    assert [[case.label for case in scene.cases] for scene in made] == [
        ["hf static", *options["policies"], FLOOR, "raas", "raas", "raas (generate)", CONTROL],
        ["hf static", "dense", "raas", FLOOR, "raas", "raas", "raas (generate)"],
    ]
    (wide,) = scenes(plan("hf static", policies=("raas",)))
    assert "raas (bfloat16)" in [case.label for case in wide.cases]


def test_what_is_compared_stands_in_one_scene():
    made = scenes(plan("hf static", policies=("dense", "raas"), batches=(16,), batched=("hf static", "raas")))
    assert [(scene.model, scene.batch) for scene in made] == [("S2", False), ("S2", True)]
    places = [(case.label, case.context, case.rows) for case in made[0].cases]
    assert len(set(places)) == len(places)
    assert {("raas", 2048, 1), ("raas", 32768, 1), ("raas (generate)", MIDDLE, 1)} < set(places)
    assert [(case.label, case.rows) for case in made[1].cases] == [("hf static", 16), ("raas", 16)]


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"budget": 200}, {"contexts": (512,)}, {"peers": ("x",)}])
def test_a_plan_out_of_range_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        PeersPlan(**{"peers": ("hf static",)} | changes)


# What is made once ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "REQUIREMENTS", tmp_path)
    (tmp_path / "peer.txt").write_text("# a peer\npeer==1.2\n")


def test_an_environment_is_made_once_and_anew_for_other_pins(cache, monkeypatch, tmp_path):
    made = []

    def commands(name, folder, python, pins):
        made.append(pins.read_text())
        return [[sys.executable, "-c", "import os, sys; os.makedirs(sys.argv[1])", str(folder)]]

    monkeypatch.setattr(folders, "_commands", commands)
    assert interpreter("peer") == interpreter("peer")
    assert len(made) == 1
    (tmp_path / "peer.txt").write_text("peer==1.3\n")
    interpreter("peer")
    assert len(made) == 2


def test_without_a_network_the_error_says_what_is_needed(cache, monkeypatch):
    failing = [[sys.executable, "-c", "import sys; sys.exit('nobody answers')"]]
    monkeypatch.setattr(folders, "_commands", lambda *arguments: failing)
    for _ in range(2):
        with pytest.raises(
            BenchError, match=r"cannot make the environment 'peer'.*nobody answers.*for peer==1\.2"
        ):
            interpreter("peer")


@pytest.mark.slow
def test_a_real_environment_runs(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    (tmp_path / "peer.txt").write_text("")
    with Worker("bench.peers.with_kvpress", interpreter("peer")) as worker:
        with pytest.raises(BenchError, match="No module named 'torch'"):
            worker.call("versions")
    (tmp_path / "peer.txt").write_text("no-such-peer==1\n")
    with pytest.raises(BenchError, match="no-such-peer==1"):
        interpreter("peer")


def test_a_model_is_the_same_for_all_and_made_once(cache, monkeypatch):
    from transformers import AutoModelForCausalLM

    folder = model_folder(MODEL)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    ours = bench_model(MODEL, device="cpu").model.state_dict()
    assert theirs.keys() == ours.keys() and all(theirs[name].equal(ours[name]) for name in ours)
    monkeypatch.setattr(folders, "bench_model", lambda *arguments, **options: pytest.fail())
    assert model_folder(MODEL) == folder
