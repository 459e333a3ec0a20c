"""The files of examples/, run as a stranger runs them, and what they print. (The one for vLLM: tests/vllm.)"""

import re
import runpy
from pathlib import Path

import pytest

from longthink.policies import registry

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def printed(monkeypatch, capsys):
    """Run an example and return what it printed; a policy that it registered is forgotten."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    def run(name):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def numbers(text):
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


@pytest.mark.slow
def test_one_changed_line_gives_the_answer_in_less_memory(printed):
    dense, bounded, memory, evicted = printed("one_line.py").splitlines()
    assert dense.replace("dense", "bounded") == bounded
    assert bounded.endswith("right: True")
    held, of_dense = numbers(memory)
    assert held < of_dense and numbers(evicted)[0] > 0


@pytest.mark.slow
def test_a_chat_holds_both_questions_and_no_more_than_its_bound(printed):
    out = printed("chat.py")
    (first, held, bound), (second, later, new_bound) = (
        numbers(line) for line in out.splitlines() if line.startswith("(")
    )
    assert out.count("\n> ") + out.startswith("> ") == 2
    assert held <= bound < first and later <= new_bound < second, "something was evicted in both turns"
    assert new_bound > bound, "the second question is protected too"


@pytest.mark.slow
def test_an_own_policy_runs_by_name_and_as_an_object(printed):
    lines = printed("own_policy.py").splitlines()
    assert [line.partition(": right")[0] for line in lines] == [
        "peak:fade=0.02", "Peak(page_size=16, fade=0.2)", "recency",
    ]  # fmt: skip
    assert lines[0].endswith("True")


@pytest.mark.slow
def test_a_budget_is_chosen_by_what_was_measured(printed):
    lines = printed("choose_budget.py").splitlines()
    rows = [re.match(r"(\w+) (\d+): KL (\S+) ", line) for line in lines[:-1]]
    near = [(int(row[2]), row[1]) for row in rows if float(row[3]) <= 0.05]
    budget, policy = min(near)
    assert len(rows) == 6 and len(near) < 6
    assert lines[-1].startswith(f"take {policy} with decode_budget={budget}: ")


@pytest.mark.slow
def test_rollouts_are_bounded_and_weighted(printed):
    lines = printed("rollouts.py").splitlines()
    assert len(lines) == 2
    for line in lines:
        weight = float(re.search(r"weight (\S+),", line)[1])
        held, dense = numbers(line.partition("keys and values")[2])
        assert 0.5 < weight < 1.5 and weight != 1 and held < dense / 2, line


def test_every_example_is_in_the_index_and_says_how_to_change_it():
    files = sorted(path.name for path in EXAMPLES.glob("*.py"))
    index = (ROOT / "docs" / "examples.md").read_text()
    assert len(files) == 6
    assert re.findall(r"^\| \[(\w+\.py)\]\(\.\./examples/\1\) \|", index, re.MULTILINE) == files
    for name in files:
        assert f"python examples/{name}" in (EXAMPLES / name).read_text()
