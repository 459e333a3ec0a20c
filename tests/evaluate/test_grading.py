"""Grading: which answers are right, which are wrong, and that no answer stops a sweep."""

import os
import signal
import sys
import time

import psutil
import pytest

from longthink.errors import GraderError, MissingExtraError
from longthink.lab.evaluate import grading
from longthink.lab.evaluate.files import Item
from longthink.lab.evaluate.grading import MAX_ANSWER, Grader, Verdict
from longthink.lab.evaluate.tasks import load_tasks
from longthink.lab.processes import Child
from tests.evaluate.data import lines, problem_file
from tests.grids import by_day


@pytest.fixture(scope="module")
def grader():
    with Grader(seconds=5) as grader:
        yield grader


@pytest.fixture(scope="module")
def impatient():
    with Grader(seconds=1) as grader:
        yield grader


def item(gold):
    return Item(task="t", id="0", question="q", gold=gold)


def judge(grader, text, gold):
    return grader.grade(item(gold), text)


@pytest.fixture
def children():
    """Function that returns the grading processes that were started in this test and run."""

    def running():
        return {
            p for p in psutil.Process().children() if "longthink.lab.evaluate.grader_process" in p.cmdline()
        }

    before = running()
    return lambda: list(running() - before)


# What is right --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, gold, answer",
    [
        (r"\boxed{18}", "18", "18"),
        (r"\boxed{18.0}", "18", "18.0"),
        (r"\boxed{\$18}", "18", r"\$18"),
        (r"\boxed{1,234}", "1234", "1,234"),
        (r"\boxed{0.5}", r"\frac{1}{2}", "0.5"),
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", r"\dfrac12"),
        (r"\boxed{2\sqrt{3} + 1}", r"1+2\sqrt3", r"2\sqrt{3} + 1"),
        (r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", "(x+1)^2"),
        (r"\boxed{x = 5}", "5", "x = 5"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", r"\text{Evelyn}"),
        (r"\boxed{204}", "204", "204"),
        (r"\boxed{18 dollars}", "18", "18 dollars"),
        (r"\boxed{18\text{ cm}}", "18", r"18\text{ cm}"),
        ("A: 18 red apples", "18", "18 red apples"),
        (r"\boxed{025}", "25", "025"),
        ("2 + 3\n#### 70,000", "70000", "70000"),
        ("so much\nA: 18", "18", "18"),
        (r"first \boxed{3}, but no: \boxed{4}", "4", "4"),
        ("\\boxed{4}\nA: 5", "4", "4"),
        (r"<think>\boxed{3}</think> It is \boxed{4}.", "4", "4"),
        (r"<think>It is \boxed{4}.</think> Done.", "4", "4"),
        ("So the answer is $4$.", "4", "4"),
        ("The final answer is 4.", "4", "4"),
    ],
)
def test_right(grader, text, gold, answer):
    assert judge(grader, text, gold) == Verdict(answer=answer, correct=True)


@pytest.mark.parametrize(
    "text, gold, answer",
    [
        (r"\boxed{17}", "18", "17"),
        (r"\boxed{-18}", "18", "-18"),
        (r"\boxed{4}, or \boxed{5}", "4", "5"),
        (r"<think>\boxed{4}</think> It is \boxed{5}.", "4", "5"),
        ("A: 4\nA: 5", "4", "5"),
        (r"\boxed{(2, 1)}", "(1, 2)", "(2, 1)"),
        (r"\boxed{[1, 2]}", "(1, 2)", "[1, 2]"),
        (r"\boxed{1.001}", "1", "1.001"),
        (r"\boxed{18 million}", "18", "18 million"),
        (r"\boxed{18 million dollars}", "18", "18 million dollars"),
        (r"\boxed{18 xy}", "18", "18 xy"),
        (r"\boxed{18 dollars}", "17", "18 dollars"),
        (r"\boxed{\text{Eva}}", r"\text{Evelyn}", r"\text{Eva}"),
        (r"\boxed{4}", "", "4"),
        ("4", "4", None),
        ("We have 4, then 4, and so on until the text was cut o", "4", None),
        ("", "4", None),
    ],
)
def test_wrong(grader, text, gold, answer):
    assert judge(grader, text, gold) == Verdict(answer=answer, correct=False)


def test_builtin_task_is_graded_by_its_last_words(children):
    (task,) = load_tasks(["reasoner/s/chain"], count=1)
    (problem,) = task.items
    with Grader() as grader:
        for text, answer, correct in [
            (f"bee= ... ; {problem.gold} </s> <pad>", problem.gold, True),
            (problem.gold, problem.gold, True),
            (f"{problem.gold} ;", None, False),
            (f"{problem.gold} cow: 05", "cow: 05", False),
            (rf"\boxed{{{problem.gold}}}", None, False),
            ("", None, False),
        ]:
            assert grader.grade(problem, text) == Verdict(answer=answer, correct=correct)
        assert children() == []  # needs no algebra


# Real answers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_golds():
    names = ["math500_part.jsonl", "aime24_part.jsonl", "gsm8k_test_part.jsonl"]
    return [task.items for task in load_tasks([], data=[problem_file(name) for name in names])]


def test_every_gold_answer_grades_itself_right(grader, real_golds, monkeypatch):
    monkeypatch.setattr(grading, "_plain", lambda answer: object())  # by algebra alone, not as text
    for items in real_golds:
        wrong = [i.gold for i in items if not judge(grader, rf"Thus \boxed{{{i.gold}}}.", i.gold).correct]
        assert wrong == []


@pytest.mark.slow
def test_gold_answers_of_other_problems_are_wrong(grader, real_golds):
    """Those judged right are listed: they are equal in fact."""
    equal = set()
    for items in real_golds:
        for shift in (1, 5):
            for one, other in zip(items, [*items[shift:], *items[:shift]], strict=True):
                verdict = judge(grader, rf"\boxed{{{other.gold}}}", one.gold)
                assert verdict.note is None
                if verdict.correct and one.gold != other.gold:
                    equal.add((one.gold, other.gold))
                assert verdict.correct or one.gold != other.gold
    assert equal == {("5", "x=5")}


@pytest.mark.slow
def test_verdicts_on_graded_solutions_agree_with_the_recorded_ones(grader):
    path = problem_file("gsm8k_model_solutions_part.jsonl")
    (task,) = load_tasks([], data=[path])
    different = []
    cases = 0
    for record, problem in zip(lines(path), task.items, strict=True):
        for model, given in record.items():
            if isinstance(given, dict):
                cases += 1
                verdict = grader.grade(problem, given["solution"])
                if verdict.correct != given["is_correct"]:
                    different.append((problem.id, model, verdict))
    assert cases == 2640
    assert different == []  # docs/grading.md says so; at most 0.5 % would have to be explained there


# Answers that want to break it ----------------------------------------------------------------------------------

HOSTILE = {
    "tower": r"\boxed{9^{9^{9^{9}}}}",
    "plain tower": "A: 9^9^9^9",
    "factorial": r"\boxed{99999999!}",
    "factorials": r"\boxed{(((9!)!)!)!}",
    "huge number": r"\boxed{" + "9" * 900 + r"^{" + "9" * 90 + "}}",
    "product": r"\boxed{\prod_{i=1}^{10^{9}} i^{i}}",
    "sum": r"\boxed{\sum_{i=1}^{10^{12}} \sin(i)}",
    "integral": r"\boxed{\int_0^1 \frac{\sin(x^x)}{x^{x^x}} dx}",
    "expansion": r"\boxed{(a+b+c+d+e+f+g)^{99999}}",
    "range": r"\boxed{\{1, 2, \ldots, 10^{12}\}}",
    "deep fractions": r"\boxed{" + r"\frac{1}{" * 60 + "1" + "}" * 60 + "}",
    "deep braces": r"\boxed{" + "{" * 450 + "1" + "}" * 450 + "}",
    "deep parentheses": r"\boxed{" + "(" * 450 + "1" + ")" * 450 + "}",
    "very deep": r"\boxed{" + r"\sqrt{" * 100_000 + "1" + "}" * 100_000 + "}",
    "megabytes of digits": r"\boxed{" + "7" * 5_000_000 + "}",
    "megabytes of boxes": r"\boxed{" * 700_000,
    "megabytes of text": "the answer is " * 400_000,
    "answers": "answer is $" * 90,
    "surrogate": "\\boxed{\ud800}",
    "surrogate text": "the answer is \udfff $\udfff$",
    "null": "\\boxed{\0}",
    "controls": "\\boxed{\x1b[2J\r\n\u202e5}",
    "percent": r"\boxed{%n%s{0}{}}",
    "only backslashes": "\\" * 1_000_001,
    "json": '\\boxed{"}\n{"answer": "4", "correct": true}\n',
    "emoji": "\\boxed{" + "🧠" * 200 + "}",
    "matrix": r"\boxed{\begin{pmatrix}" + r"1&2\\" * 150 + r"\end{pmatrix}^{99999}}",
}


ENDLESS = {"factorials", "product", "sum", "integral", "deep parentheses"}
"""Others take too long in the same way: each costs the start of a process."""


@pytest.mark.slow
@pytest.mark.parametrize("name", by_day([name for name in HOSTILE if name not in ENDLESS], HOSTILE))
def test_hostile_answers_are_wrong_and_nothing_else(impatient, name):
    started = time.monotonic()
    verdict = judge(impatient, HOSTILE[name], "4")
    assert not verdict.correct
    assert time.monotonic() - started < 60  # with the start of the process on a busy machine
    if verdict.answer is not None:
        assert len(verdict.answer) <= MAX_ANSWER
        verdict.answer.encode()
    assert judge(impatient, r"\boxed{8/2}", "4").correct  # the next answer is graded as ever


CODE = "__import__('pathlib').Path('{}').touch()"


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{%s}",
        "A: %s",
        "the answer is $%s$",
        "the answer is 1+%s",
        r"\boxed{\text{%s}}",
        r"\boxed{1 + %s}",
    ],
)
def test_answers_are_not_run(grader, tmp_path, text):
    mark = tmp_path / "mark"
    assert not judge(grader, text % CODE.format(mark), "4").correct
    assert not mark.exists()


# The process ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_time_limit_kills_and_the_next_answer_gets_a_new_process(children):
    with Grader(seconds=0.5) as grader:
        assert judge(grader, r"\boxed{8/2}", "4").correct
        (first,) = children()
        started = time.monotonic()
        os.kill(first.pid, signal.SIGSTOP)  # no answer will ever come
        verdict = judge(grader, r"\boxed{8/2}", "4")
        assert verdict == Verdict(answer="8/2", correct=False, note="grading took longer than 0.5 s")
        assert time.monotonic() - started < 10
        assert not first.is_running()
        assert judge(grader, r"\boxed{8/2}", "4").correct
        assert [p.pid for p in children()] != [first.pid]


@pytest.mark.slow
def test_a_dead_process_is_replaced(children):
    with Grader() as grader:
        assert judge(grader, r"\boxed{8/2}", "4").correct
        (first,) = children()
        first.kill()
        verdict = judge(grader, r"\boxed{8/2}", "4")
        assert verdict == Verdict(answer="8/2", correct=False, note="grading ended its process")
        assert judge(grader, r"\boxed{8/2}", "4").correct


@pytest.mark.slow
def test_interrupt_while_waiting_does_not_mix_up_answers(monkeypatch):
    with Grader() as grader:
        assert judge(grader, r"\boxed{8/2}", "4").correct
        with monkeypatch.context() as patch:
            patch.setattr(Child, "receive", interrupt)
            with pytest.raises(KeyboardInterrupt):
                judge(grader, r"\boxed{9/3}", "3")
        assert judge(grader, r"\boxed{8/2}", "7") == Verdict(answer="8/2", correct=False)


def interrupt(*arguments):
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="no such limits on this system")
def test_memory_limit(children):
    with Grader(memory_mib=1500) as grader:
        assert judge(grader, r"\boxed{8/2}", "4").correct
        (process,) = children()
        assert process.rlimit(psutil.RLIMIT_AS) == (1500 * 2**20, 1500 * 2**20)


@pytest.mark.slow
def test_a_stuck_process_whose_parent_is_gone_ends_by_itself(monkeypatch, children):
    with Grader(seconds=0.5) as grader:
        monkeypatch.setattr(grader, "close", lambda: None)  # as if the parent had no time to kill it
        assert judge(grader, HOSTILE["product"], "4").note == "grading took longer than 0.5 s"
        (process,) = children()
        process.wait(30)
        monkeypatch.undo()


@pytest.mark.slow
def test_files_of_the_current_folder_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "sympy.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    with Grader() as grader:
        assert judge(grader, r"\boxed{8/2}", "4").correct


def test_a_process_that_cannot_start_is_an_error_and_not_a_verdict(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Grader() as grader:
        with pytest.raises(GraderError, match="ended at its start"):
            judge(grader, r"\boxed{8/2}", "4")


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(grading, "find_spec", lambda name: None)
    with Grader() as grader:
        with pytest.raises(MissingExtraError, match=r'pip install "longthink\[eval\]"'):
            judge(grader, r"\boxed{8/2}", "4")


@pytest.mark.slow
@pytest.mark.parametrize(
    "limits", [{"seconds": 0}, {"seconds": float("nan")}, {"memory_mib": 8}, {"memory_mib": 1e4}]
)
def test_limits_are_checked(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        Grader(**limits)
