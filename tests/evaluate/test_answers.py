"""Where the final answer of a text is."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longthink.lab.evaluate.answers import last_answer_line, last_box, parts_to_read, stated_answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\framebox{204} minutes", "204"),
        (r"\fbox{3}", "3"),
        (r"\boxed {3}", "3"),
        (r"line break\\\boxed{3}", "3"),
        (r"} \boxed{4} {", "4"),
        (r"{ \boxed{4", None),
        (r"\boxed{4} then \boxed{cut o", "4"),
        (r"\boxed{4}, as asked in \boxed{}", "4"),
        (r"\boxed{ 4 }", "4"),
        ("boxed{4}", None),
        ("", None),
    ],
)
def test_last_box(text, answer):
    assert last_box(text) == answer


@given(
    st.recursive(st.sampled_from(["1", "x", r"\{", r"\}", r"\\", " + "]), lambda s: s.map("{{{}}}".format))
)
def test_box_gives_back_what_is_in_it(content):
    if content.strip():
        assert last_box(f"{{ \\boxed{{9}} so \\boxed{{{content}}} }}") == content.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece", [r"\boxed{", "{", "}", "\\", r"\boxed{}", "####", "A:", " ", "\n", "\n ", "\n#### "]
)
def test_a_megabyte_takes_no_time(piece):
    started = time.monotonic()
    stated_answer(piece * (1_000_000 // len(piece)))
    assert time.monotonic() - started < 20  # quadratic: hours


@pytest.mark.parametrize(
    "text, answer",
    [
        ("2 + 3 = 5\n#### 5", "5"),
        ("A: 18", "18"),
        ("A: 18\nno\nA: 1,234,567", "1234567"),
        ("#### 1,5", "1,5"),
        ("  ####   70,000  ", "70000"),
        ("Q\nA: 3\nA:", "3"),
        ("see A: 5", None),
        ("", None),
    ],
)
def test_last_answer_line(text, answer):
    assert last_answer_line(text) == answer


def test_box_comes_before_line():
    assert stated_answer("\\boxed{4}\nA: 5") == "4"
    assert stated_answer("\\boxed{}\nA: 5") == "5"


@pytest.mark.parametrize(
    "text, parts",
    [
        ("a", ["a"]),
        ("<think>a</think>b", ["b", "<think>a</think>b"]),
        ("a</think>b</think>c", ["c", "a</think>b</think>c"]),
        ("<think>a", ["<think>a"]),
        ("a</think>\n", ["a</think>\n"]),
    ],
)
def test_parts_to_read(text, parts):
    assert parts_to_read(text) == parts
