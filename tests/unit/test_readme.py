"""The README's commands and code, as a stranger would type them."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from longthink.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text()
COMMANDS = re.findall(r"^    \.venv/bin/longthink ([^#\n]+?) *(?:#.*)?$", README, re.MULTILINE)


CHAIN = ("trace", "what-if", "report")
"""Commands that follow each other, in one folder."""


def test_the_first_commands_are_there():
    first = ["generate", "policies", "doctor", "doctor", "eval"]
    assert [command.split()[0] for command in COMMANDS] == [*first, *CHAIN]


@pytest.mark.slow
def test_the_very_first_command_succeeds_in_a_process_of_its_own():
    words = [sys.executable, "-m", "longthink.cli", *shlex.split(COMMANDS[0])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS[1:] if not c.startswith(("eval", *CHAIN))])
def test_first_commands_succeed(command, capsys):
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_chain_of_the_analysis_succeeds(tmp_path, monkeypatch, capsys):
    """As it stands in the README, on one problem of the four."""
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS[-len(CHAIN) :]:
        words = [word.replace("reasoner/s", "reasoner/s/chain") for word in shlex.split(command)]
        assert main(words) == 0
        assert capsys.readouterr().out.strip()
    assert (tmp_path / "traces" / "report" / "attention.html").stat().st_size > 100_000


@pytest.mark.slow
def test_command_of_the_table_runs_and_names_the_policies_of_its_rows(tmp_path):
    words = shlex.split(next(c for c in COMMANDS if c.startswith("eval")))
    smaller = {"-n": "1", "--tasks": "reasoner/s/chain", "--budgets": "192"}
    words = [smaller.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    assert main([*words, "--out", str(tmp_path / "results")]) == 0
    rows = re.findall(r"^\| `([^`]+)` \| O\(", README, re.MULTILINE)
    assert rows == words[words.index("--policies") + 1].split(",")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("README.md", " True\n"),
        ("docs/engine.md", "\n1 cancelled "),
        ("docs/conversations.md", "True False\n"),
    ],
)
def test_python_of_the_page_runs(page, printed, tmp_path, capsys, monkeypatch):
    text = (Path(__file__).parents[2] / page).read_text()
    whole = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_reasoner" in code]
    assert whole
    script = tmp_path / "readme.py"
    script.write_text("\n".join(whole))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    assert printed in capsys.readouterr().out
