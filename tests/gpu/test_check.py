"""The command behind `make gpu-check`: no part takes anything from another one, and what was found is written."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from scripts.gpu_check.command import _environment, main
from scripts.gpu_check.packages import WHEELS, install, missing
from scripts.gpu_check.parts import DENSE, GROUPS, ROUTE, TESTS, Part, full_plan, small_plan
from scripts.gpu_check.report import Report
from scripts.gpu_check.runner import ROOT, Runner
from scripts.gpu_check.tables import page


def stub(name: str, call: str, limit_s: float = 30.0, **settings) -> Part:
    return Part(name, f"tests.gpu.stubs:{call}", settings, limit_s, least_s=1.0, gigabytes=1.0)


def run(parts: list[Part], folder: Path, workers: int = 2, limit_s: float = 60.0) -> dict:
    """Outcomes by name."""
    found = {}
    runner = Runner(folder, workers, time.monotonic() + limit_s, _environment("", workers))
    runner.run(parts, lambda outcome: found.update({outcome.part.name: outcome}))
    assert found.keys() == {part.name for part in parts}
    return found


@pytest.mark.slow
def test_a_part_that_fails_takes_nothing_from_the_others(tmp_path):
    calls = ("finds", "raises", "dies", "sleeps", "goes_on_in_a_new_process", "is_not_there")
    found = run([stub(call, call, 4.0 if call == "sleeps" else 30.0) for call in calls], tmp_path, workers=3)
    states = {name: outcome.state for name, outcome in found.items()}
    assert states == {
        "finds": "done", "raises": "failed", "dies": "failed", "sleeps": "timed out",
        "goes_on_in_a_new_process": "done", "is_not_there": "failed",
    }  # fmt: skip
    assert found["raises"].note == "ValueError: it broke"
    assert "signal 11" in found["dies"].note
    assert found["sleeps"].note == "its limit is 4 s" and 4 <= found["sleeps"].seconds < 10
    for name in ("raises", "dies", "sleeps"):
        assert found[name].found["rows"][0]["found"].startswith("before it")
    processes = [row["process"] for row in found["goes_on_in_a_new_process"].found["rows"]]
    assert len(set(processes)) == 3
    assert (tmp_path / "goes-on-in-a-new-process.log").read_text() == "this goes to the log\n" * 3


@pytest.mark.slow
def test_what_is_timed_has_the_machine_to_itself(tmp_path):
    stop = str(tmp_path / "stop")
    parts = [stub("runs", "counts_time", stop=stop), stub("one", "times"), stub("two", "times")]
    # The last part can begin only when one that times has ended.
    found = run([*parts, stub("ends", "ends", stop=stop)], tmp_path, workers=3)
    quiet = [(row["began"], row["ended"]) for name in ("one", "two") for row in found[name].found["rows"]]
    assert len(quiet) == 4
    for began, ended in quiet:
        assert not [moment for moment in found["runs"].found["moments"] if began < moment < ended]
    for (_, ended), (began, _) in zip(sorted(quiet), sorted(quiet)[1:], strict=False):
        assert ended <= began


@pytest.mark.slow
def test_what_no_longer_fits_is_skipped_and_says_so(tmp_path):
    late = Part("late", "tests.gpu.stubs:finds", least_s=20.0)
    found = run([stub("sleeps", "sleeps"), late], tmp_path, workers=1, limit_s=3.0)
    assert found["sleeps"].note == "the time limit of the check was reached"
    assert found["late"].state == "skipped" and "20 at least" in found["late"].note


def test_the_tables_say_what_there_is_and_what_there_is_not(tmp_path):
    cell = {"shape": "s", "layers_of": 4, "policy": "raas", "budget": 64, "rows": 1}
    parts = [stub("device", "finds"), stub("broken", "raises")]
    for route, ms, layers in (("general", 3.0, 4), ("fused", 2.0, 4), ("once", 2.5, 4), ("general", 1.6, 2)):
        row = cell | {"route": route, "ms": ms, "layers": layers, "ms_all_layers": ms * 4 / layers}
        row["replays_per_step"] = 1.0
        parts.append(stub(f"{route} {layers}", "measures", **row))
    found = run(parts, tmp_path, workers=5)
    # What counts a part's numbers as times of a route is what it was called for.
    plan = [replace(part, call=ROUTE) if part.call.endswith("measures") else part for part in parts]
    report = Report([*plan, stub("late", "finds")], self_test=False)
    for part in plan:
        report.add(replace(found[part.name], part=part), 1.0)
    report.write(tmp_path)
    content = json.loads((tmp_path / "gpu-check.json").read_text())
    whole, few = content["routes"]
    assert whole["times_as_fast"] == 1.5 and whole["fused"]["of_copy"] == 0.5 and "fused" not in few
    written = (tmp_path / "gpu-check.md").read_text()
    assert written == page(content) and not report.good
    assert (
        "| s | 4 of 4 | raas | 64 | 1 | 3.0 | 2.0 | 3.0 | 2.0 | 1.5 | yes | 0.5 / 0.5 | 50% / 50% |"
        in written
    )
    assert "| s | raas | 64 | 1 | 3.0 | 2.5 | None | None | 1.0 |" in written
    assert "| s | raas | 64 | 1 | general | 2 | 3.2 | 3.0 | 1.067 |" in written
    assert "| broken | failed |" in written and "| late | not ended |" in written
    assert "Not ended yet" in written


def test_plans_are_in_order_of_worth():
    kinds = [part.call for part in full_plan()]
    assert kinds.index(TESTS) < kinds.index(ROUTE) < kinds.index(DENSE)
    for plan in (full_plan(), small_plan()):
        assert len({part.name for part in plan}) == len(plan)
        assert {TESTS, ROUTE, DENSE} < {part.call for part in plan}


@pytest.mark.slow
def test_only_what_is_missing_is_installed(tmp_path, monkeypatch):
    assert missing({"json": "json", "not_there_at_all": "x"}) == ["not_there_at_all"]
    assert install(tmp_path, tmp_path / "site") == []
    monkeypatch.setitem(WHEELS, "not_there_at_all", "not-there-at-all")
    with pytest.raises(ValueError, match="has no wheel of not-there-at-all"):
        install(tmp_path, tmp_path / "site")


@pytest.mark.parametrize(
    ("options", "why"),
    [(["--only", "no such part"], "no part has"), (["--wheels", "nowhere"], "no CUDA GPU")],
)
def test_what_cannot_begin_says_why(options, why, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("scripts.gpu_check.command.has_gpu", lambda: False)
    assert main([*options, "--out", str(tmp_path)]) == 2
    assert why in capsys.readouterr().err


def test_a_command_that_is_stopped_writes_what_it_has_found(tmp_path):
    tool = [sys.executable, "scripts/gpu_check", "--self-test", "--out", str(tmp_path), "--workers", "1"]
    process = subprocess.Popen(tool, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().endswith("540 s at most\n")
    process.terminate()
    told = process.communicate(timeout=30)[0]
    assert process.returncode == 1 and "stopped; what was found until now is written" in told
    content = json.loads((tmp_path / "gpu-check.json").read_text())
    states = {part["state"] for part in content["parts"]}
    assert content["ended"] and states <= {"timed out", "skipped", "not ended"}


LEFT_OUT = "tiny (milestone|recall)"
"""Parts that differ from those that run by the policy alone."""


@pytest.mark.slow
def test_the_whole_self_test_measures_what_needs_no_gpu(tmp_path):
    tool = [sys.executable, "scripts/gpu_check", "--self-test", "--out", str(tmp_path), "--workers", "2"]
    done = subprocess.run([*tool, "--only", f"^(?!{LEFT_OUT})"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "gpu-check.json").read_text())
    parts = {part["name"]: part for part in content["parts"]}
    assert parts.keys() == {part.name for part in small_plan() if not re.match(LEFT_OUT, part.name)}
    assert {part["state"] for part in content["parts"]} == {"done", "no GPU"}
    assert content["tests"].keys() == GROUPS.keys()
    for group, tests in content["tests"].items():
        assert tests["failed"] == 0 and (tests["passed"] > 0 or group == "kernels")
    assert len(content["dense"]) == 2 and len(content["routes"]) == 2
    assert parts["tiny raas general"]["state"] == "done" and parts["tiny raas general"]["found"]["kernels"]
    assert parts["tiny raas fused"]["state"] == "no GPU"
    rows = [cell["general"] for cell in content["routes"] if cell["policy"] == "raas"]
    (general,) = [row for row in rows if row["layers"] == 2]
    assert general["ms"] > 0 and general["kv_bytes"] == 2 * 2 * 2 * 2 * 64 * 16 * 2
    assert content["ended"] and "its numbers mean nothing" in (tmp_path / "gpu-check.md").read_text()
