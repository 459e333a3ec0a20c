"""Ctrl-C, closed pipes and terminals, with real processes."""

import json
import os
import pty
import signal
import threading

import pytest

from longthink.cli.decode import catch_interrupt
from tests.cli.conftest import save_model

ENDLESS = ("--max-new-tokens", "20000", "--decode-budget", "32", "--compile", "off")


@pytest.mark.slow
def test_ctrl_c_ends_with_what_there_is(start, plain_model):
    process = start("generate", "hello", "--model", plain_model, *ENDLESS, bufsize=0)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + rest).endswith(b"\n")
    (closing,) = [line for line in err.decode().splitlines() if " tokens (interrupted) · " in line]
    assert closing.endswith(" evictions")
    assert b"Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_with_json_is_still_json(start, plain_model):
    process = start("generate", "hello", "--model", plain_model, *ENDLESS, "--json", bufsize=0)
    # The first plain progress line says that tokens are being made.
    for line in process.stderr:
        if line.startswith(b"generating"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    record = json.loads(out)
    assert record["stopped"] == "interrupted"
    assert record["tokens"]["generated"] > 0
    assert b"Traceback" not in err


@pytest.mark.slow
def test_closed_pipe_is_silent(start, plain_model):
    process = start("generate", "hello", "--model", plain_model, *ENDLESS, bufsize=0)
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in err
    assert b"Error" not in err


@pytest.mark.slow
def test_closed_pipe_of_a_short_answer_is_silent(start):
    process = start("policies", bufsize=0)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert err == b""


def read_all(descriptor):
    data = b""
    try:
        while chunk := os.read(descriptor, 65536):
            data += chunk
    except OSError:  # Linux: the other side has closed the terminal
        pass
    return data


@pytest.mark.slow
def test_standard_output_on_a_full_disk(start):
    with open("/dev/full", "w") as full:
        process = start("policies", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        err.decode() == "longthink: No space left on device: free some space and run the same command again\n"
    )


@pytest.mark.slow
def test_model_text_cannot_command_the_terminal(start, tmp_path):
    """A model that says nothing but escape sequences: on a terminal they are shown, not obeyed."""
    evil = [f"\x1b]0;owned{i}\x07\x9b31m\r\u202e" for i in range(64)]
    folder = save_model(tmp_path, evil)
    arguments = ("generate", "start", "--model", folder, "--max-new-tokens", "20", "--decode-budget", "32")
    ours, theirs = pty.openpty()
    process = start(*arguments, stdout=theirs)
    os.close(theirs)
    shown = read_all(ours)
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "\u241b]0;owned" in text
    assert not set(text.replace("\r\n", "\n")) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"}


def test_first_ctrl_c_sets_a_flag_and_the_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), catch_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_run_without_a_handler():
    seen = []

    def work():
        with catch_interrupt() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_ctrl_c_elsewhere_is_a_line(call, monkeypatch):
    def pressed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("longthink.policies.available_policies", pressed)
    assert call("policies") == (130, "", "interrupted\n")
