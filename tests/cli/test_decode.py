"""Pieces below the commands: text from tokens, times, progress, safe text."""

import io
import math
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longthink.cli import progress as progress_module
from longthink.cli.decode import Decoded, Detokenizer
from longthink.cli.progress import progress
from longthink.cli.terminal import shares_place
from longthink.cli.text import one_line, size_text, visible


class Bytes:
    """Tokenizer whose tokens are bytes."""

    @staticmethod
    def decode(ids, skip_special_tokens):
        assert skip_special_tokens
        return bytes(i for i in ids if i != 0).decode("utf-8", errors="replace")


@given(st.text(st.characters(exclude_characters="\0\ufffd", exclude_categories=["Cs"]), max_size=40))
def test_pieces_add_up_to_the_text(text):
    detokenizer = Detokenizer(Bytes)
    pieces = [detokenizer.add(byte) for byte in text.encode()]
    assert "".join([*pieces, detokenizer.rest()]) == text
    assert detokenizer.rest() == ""


def test_incomplete_character_is_held_back_and_given_up_at_the_end():
    detokenizer = Detokenizer(Bytes)
    first, second = "é".encode()
    assert [detokenizer.add(ord("a")), detokenizer.add(first), detokenizer.add(second)] == ["a", "", "é"]
    assert detokenizer.add(first) == ""
    assert detokenizer.rest() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_silent():
    detokenizer = Detokenizer(Bytes)
    assert [detokenizer.add(i) for i in (0, ord("a"), 0, ord("b"))] == ["", "a", "", "b"]


def test_times():
    decoded = Decoded(step_s=[1.0, 0.1, 0.1, 0.3])
    assert decoded.prompt_s == 1.0
    assert decoded.decode_s == pytest.approx(0.5)
    assert decoded.tokens_per_s == pytest.approx(6)
    assert decoded.ms_per_token(slice(None, 2)) == pytest.approx(100)
    assert decoded.ms_per_token(slice(-1, None)) == pytest.approx(300)


@pytest.mark.parametrize("steps", [[], [1.0]])
def test_times_of_almost_nothing(steps):
    decoded = Decoded(step_s=steps)
    assert decoded.tokens_per_s == 0
    assert math.isnan(decoded.ms_per_token(slice(None)))


@given(st.text())
def test_visible_text_has_no_controls(text):
    shown = visible(text)
    assert all(character in "\n\t" or ord(character) >= 0x20 for character in shown)
    assert not any(0x7F <= ord(character) <= 0x9F or "\u202a" <= character <= "\u202e" for character in shown)
    assert "\n" not in one_line(text)


def test_visible_keeps_ordinary_text():
    text = "Größe 数学 🧠 x²\n\ty"
    assert visible(text) == text
    assert visible("\x1b[2J\x7f\x9b\u202e") == "␛[2J␡\\x9b\\u202e"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (262144, "256 KiB"), (3 << 40, "3072 GiB")],
)
def test_sizes(count, text):
    assert size_text(count) == text


def test_same_place(tmp_path):
    with (
        (tmp_path / "a").open("w") as one,
        (tmp_path / "a").open("a") as same,
        (tmp_path / "b").open("w") as other,
    ):
        assert shares_place(one, same)
        assert not shares_place(one, other)
    assert not shares_place(io.StringIO(), io.StringIO())


def test_short_work_prints_no_progress(capsys):
    with progress("working", total=3, unit="steps") as task:
        for i in range(3):
            task.advance_to(i + 1)
    assert capsys.readouterr().err == ""


def test_long_work_prints_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 0.0)
    with progress("working", total=3, unit="steps") as task:
        task.advance_to(1, "fast")
        task.advance_to(2)
        task.hide()
        task.advance_to(3)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line != "working ..."] == [
        "working: 1/3 steps, fast",
        "working: 2/3 steps",
    ]


def test_work_that_cannot_report_says_that_it_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "FIRST_LINE_S", 0.01)
    with progress("loading"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "loading ...\n"


@pytest.mark.parametrize("total", [None, 3])
def test_terminal_gets_a_bar_that_goes_away(monkeypatch, total):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress("working", total=total, unit="steps") as task:
        task.advance_to(1, "\x1b[2Jfast")
        time.sleep(0.2)
        task.hide()
    assert "working" in screen.getvalue()
    assert "\x1b[2Jfast" not in screen.getvalue()
