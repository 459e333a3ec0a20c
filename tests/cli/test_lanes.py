"""The lanes of the demo's race: who runs what, and what becomes of a helper that ends early."""

import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict
from queue import SimpleQueue

import pytest

from longthink.cli.decode import Decoded
from longthink.lab.cli import lanes
from longthink.lab.cli.lanes import Course, race
from longthink.lab.cli.race import ResidentLog, Runner
from longthink.lab.processes import ChildDied
from longthink.policies import make_policy

COURSE = Course(prompt="a prompt", budget={"decode_budget": 64}, limit=10)
NAMES = ["dense", "raas", "milestone", "recency"]


def silent(runner):
    return nullcontext(lambda: None)


@pytest.fixture
def runners():
    return [Runner(policy=make_policy(name), log=ResidentLog(prompt=3)) for name in NAMES]


@pytest.fixture
def run_here(monkeypatch):
    """Names of the policies that were run in this process, by a stand-in for `run_policy`."""
    names = []

    def run_policy(runner, loaded, inputs, budget, *, limit, on_change):
        assert (loaded, inputs, budget, limit) == ("model", "ids of a prompt", COURSE.budget, COURSE.limit)
        assert runner.tail == ""
        names.append(runner.name)
        on_change()
        runner.decoded = Decoded(text="here")

    monkeypatch.setattr(lanes, "run_policy", run_policy)
    monkeypatch.setattr(lanes, "encode_prompt", lambda loaded, prompt, raw: f"ids of {prompt}")
    return names


class Model:
    """Stands for what is loaded."""

    tokenizer = None

    def __eq__(self, other):
        return other == "model"


class Thread:
    """A helper that is a thread of this process: ``answers`` gets what it is sent and a way to reply."""

    def __init__(self, answers):
        self.send, asked = (queue := SimpleQueue()).put, queue.get
        self.replies = SimpleQueue()

        def work():
            self.replies.put("ready")
            answers(asked, self.replies.put)
            self.replies.put(ChildDied("exit code 1"))

        threading.Thread(target=work, daemon=True).start()

    def receive(self):
        message = self.replies.get()
        if isinstance(message, Exception):
            raise message
        return message


def test_without_helpers_all_run_here_in_order(runners, run_here):
    assert race(runners, Model(), COURSE, [], silent) == 1
    assert run_here == NAMES


def test_a_free_lane_takes_the_next_policy(runners, run_here):
    """While one policy runs here, the helper does all others."""
    got, all_told, told = [], threading.Event(), []

    def answers(receive, send):
        for _ in NAMES[1:]:
            got.append(receive())
            send([{"tokens": 5, "tail": "so far"}, None, {}])
            send([{"tokens": 9}, {"text": "there"}, {"steps": [9]}])

    def shown(runner):
        return nullcontext(lambda: tell(runner))

    def tell(runner):
        if threading.current_thread() is threading.main_thread():
            assert all_told.wait(10)
            return
        told.append((runner.name, runner.tokens))
        if len(told) == 6:
            all_told.set()

    assert race(runners, Model(), COURSE, [Thread(answers)], shown) == 2
    (here,) = run_here
    there = [name for name in NAMES if name != here]
    assert got == [[name, 3, asdict(COURSE)] for name in there]
    assert all(runner.log.steps == ([9] if runner.name in there else []) for runner in runners)
    assert told == [(name, tokens) for name in there for tokens in (5, 9)]
    assert {runner.name: runner.decoded.text for runner in runners} == dict.fromkeys(there, "there") | {
        here: "here"
    }


def test_what_a_dead_helper_leaves_is_run_here(runners, run_here):
    def answers(receive, send):
        receive()
        send([{"tokens": 5, "tail": "so far"}, None, {}])

    helping = [Thread(answers), Thread(lambda receive, send: None)]
    assert race(runners, Model(), COURSE, helping, silent) == 1
    assert sorted(run_here) == sorted(NAMES)
    assert all(runner.decoded.text == "here" for runner in runners)


def test_an_error_here_ends_the_race(runners, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("no budget")

    monkeypatch.setattr(lanes, "run_policy", fail)
    monkeypatch.setattr(lanes, "encode_prompt", lambda *arguments, **options: None)
    with pytest.raises(ValueError, match="no budget"):
        race(runners, Model(), COURSE, [Thread(lambda receive, send: time.sleep(10))], silent)


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(start, tmp_path):
    """Each of them holds standard error, so reading it to its end is waiting for all."""
    words = ("demo", "--size", "m", "--workers", "2", "--png", tmp_path / "x.png")
    process = start(*words, start_new_session=True, bufsize=0)
    for line in process.stderr:
        if line.startswith(b"raas: "):  # the helper's
            break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith(b"interrupted\n")
    assert b"Traceback" not in err
