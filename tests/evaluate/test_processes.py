"""Child processes: what they say arrives, and nothing of them stays, however either side ends."""

import os
import queue
import signal
import subprocess
import sys
import time

import psutil
import pytest

from longthink.errors import BudgetError
from longthink.lab.processes import Child, ChildDied

WORKER = """
import os, signal, sys, time
from longthink.errors import BudgetError
from longthink.lab.processes import serve

class Strange(Exception):
    pass

def work(parent):
    while True:
        match parent.receive():
            case ["echo", value]:
                print("this is not a message")
                parent.send(value)
            case ["raise", "known"]:
                raise BudgetError("too small")
            case ["raise", "built-in"]:
                raise UnicodeDecodeError("utf-8", b"", 0, 1, "odd")
            case ["raise", "strange"]:
                raise Strange("odd")
            case ["die"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["exit"]:
                os._exit(3)
            case ["sleep"]:
                time.sleep(60)
            case ["stop"]:
                return

if __name__ == "__main__":
    serve(work)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    (tmp_path / "echoing.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    started = []

    def child(**options):
        started.append(Child("echoing", **options))
        return started[-1]

    yield child
    for one in started:
        one.close()


@pytest.mark.parametrize("value", [None, 1.5, "ü\ud800\n\x00", {"a": [1, None]}, "x" * 1_000_000])
def test_messages_arrive_and_prints_are_none(start, value):
    child = start(quiet=True)
    for _ in range(2):
        child.send(["echo", value])
        assert child.receive(30) == value


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("known", BudgetError, "^too small$"),
        ("built-in", RuntimeError, "UnicodeDecodeError in a child process: .*odd"),
        ("strange", RuntimeError, "^Strange in a child process: odd$"),
    ],
)
def test_an_error_of_the_child_is_one_of_the_parent(start, what, error, text):
    child = start()
    child.send(["raise", what])
    with pytest.raises(error, match=text):
        child.receive(30)
    with pytest.raises(ChildDied, match="exit code 1"):
        child.receive(30)


@pytest.mark.parametrize(
    ("how", "text"), [("die", "signal SIGKILL"), ("exit", "exit code 3"), ("stop", "exit code 0")]
)
def test_a_dead_child_is_named(start, how, text):
    child = start()
    child.send([how])
    with pytest.raises(ChildDied, match=text):
        child.receive(30)
    child.send(["echo", 1])  # into a closed pipe


def test_time_limit(start):
    child = start()
    child.send(["echo", 1])
    assert child.receive(30) == 1
    child.send(["sleep"])
    with pytest.raises(TimeoutError):
        child.receive(0.2)


def test_children_share_an_inbox(start):
    inbox = queue.SimpleQueue()
    children = [start(inbox=inbox, quiet=True) for _ in range(2)]
    children[0].send(["die"])
    children[1].send(["echo", "alive"])
    found = {}
    for _ in range(2):
        child, line = inbox.get(timeout=30)
        try:
            found[child] = child.parse(line)
        except ChildDied as death:
            found[child] = str(death)
    assert found == {children[0]: "signal SIGKILL", children[1]: "alive"}


def test_close_leaves_no_process(start):
    child = start()
    child.send(["sleep"])
    process = psutil.Process(child.pid)
    child.close()
    assert not process.is_running()


def test_ctrl_c_does_not_reach_the_child_even_while_it_starts(start):
    child = start(quiet=True)
    for _ in range(40):
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.01)
    child.send(["echo", "here"])
    assert child.receive(30) == "here"


PARENT = """
import sys
from longthink.lab.processes import Child
child = Child("echoing")
child.send(["echo", 1])
child.receive()
child.send(["sleep"])
print(child.pid, flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [True, False])
def test_a_child_ends_with_its_parent(start, killed):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = psutil.Process(int(parent.stdout.readline()))
    if killed:
        parent.kill()
    parent.communicate(b"\n")
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
