"""The commands of docs/out-of-memory.md, one after another in one folder, as its reader types them.

By day with fewer and shorter problems.
"""

import re
import shlex
from pathlib import Path

import pytest

from longthink.cli import main
from longthink.lab.results.statistics import wilson
from tests.examples import TIMES

PAGE = (Path(__file__).parents[2] / "docs" / "out-of-memory.md").read_text()
COMMANDS = re.findall(r"^    longthink (.+)$", PAGE, re.MULTILINE)


@pytest.mark.slow
def test_its_commands_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    found = {}
    fewer = {"-n": "1", "--size": "s"} if TIMES == 1 else {}
    for command in COMMANDS:
        words = shlex.split(command)
        words = [fewer.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        assert main(words) == 0, command
        found[words[0]] = "".join(capsys.readouterr())
    assert [*found] == ["doctor", "generate", "advise", "fidelity", "eval", "report"]
    assert re.search(r"Smallest: \S+ with --decode-budget (48|64|80|96) is", found["advise"])
    assert re.search(r"[1-9]\d* were there", found["fidelity"]), "what advise measured is not measured again"
    assert (tmp_path / "budget" / "report" / "report.html").stat().st_size > 10_000


def test_its_numbers_are_right():
    per_token = 2 * 28 * 4 * 128 * 2
    assert f"that is {per_token // 1024} KiB" in PAGE
    assert f"{per_token * 32768 / 2**30:.2f} GiB for a chain" in PAGE
    assert f"{per_token * 32768 * 16 / 2**30:.0f} GiB for sixteen" in PAGE
    low, high = wilson(4, 4)
    assert f"4 of 4 right is {low:.0%} to {high:.0%}".replace("%", "", 1).replace("%", " %") in PAGE
