"""``python -m tools.train_reasoner``."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from longthink.cli import main as longthink
from longthink.reasoner import grade, make_problem
from tools.train_reasoner import __main__ as command
from tools.train_reasoner.card import write_card
from tools.train_reasoner.evaluate import WEIGHTS

SETTINGS = (
    "--batch-tokens 256 --last-ops 4 --no-compile --save-every 5 --layers 2 --hidden 64 --mlp 64".split()
)


@pytest.fixture
def call(capsys):
    """Run the tool in this process; returns exit code, stdout and stderr."""

    def run(*arguments, main=command.main):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_train_resumes_and_its_model_generates(call, tmp_path):
    run = tmp_path / "run"
    code, out, err = call("train", run, "--tokens", 8000, *SETTINGS)
    assert code == 0, err
    assert out.strip() == str(run / "model")
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 1
    code, _, err = call("train", run, "--tokens", 9000, *SETTINGS)
    assert code == 2
    assert "tokens=9000" in err
    made = make_problem(profile="chain", size="s", seed=7)
    options = ("--model", run / "model", "--max-new-tokens", 20, "--decode-budget", 64)
    code, out, _ = call("generate", made.prompt, *options, main=longthink)
    assert code == 0
    assert not grade(made, out)


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_the_same_command(call, tmp_path):
    run = tmp_path / "run"
    arguments = [
        sys.executable,
        "-m",
        "tools.train_reasoner",
        "train",
        str(run),
        "--tokens",
        "20000",
        *SETTINGS,
    ]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(arguments, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "the same command resumes the run" in err
    code, out, err = call(*arguments[3:])
    assert (code, out.strip()) == (0, str(run / "model")), err
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(20, steps[-1] + 1, 20)]


def test_bad_settings_are_refused(call, tmp_path):
    code, _, err = call("train", tmp_path / "run", "--tokens", 0)
    assert code == 2
    assert "tokens=0" in err
    code, _, err = call("evaluate", tmp_path / "nothing", "--s", 1)
    assert code != 0


def test_evaluate_takes_the_sizes_that_are_asked_for(call, monkeypatch):
    asked = []
    monkeypatch.setattr(
        command, "evaluate_model", lambda *arguments, **options: asked.append((arguments, options))
    )
    assert call("evaluate", "--s", 2, "--m", 0, "--l", 0, "--xl", 0, "--seed", 7)[0] == 0
    assert asked == [((WEIGHTS,), {"problems": {"s": 2}, "seed": 7})]


def test_the_shipped_card_is_the_one_that_its_template_writes(tmp_path):
    for name in ("training.json", "evaluation.json"):
        (tmp_path / name).write_bytes((WEIGHTS / name).read_bytes())
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == (WEIGHTS / "README.md").read_text()
