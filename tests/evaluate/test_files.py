"""Problem files: which fields are found, which answers are read, and what is refused in which words."""

import re
from dataclasses import replace

import pyarrow as pa
import pytest
from pyarrow import parquet

from longthink.errors import DataError
from longthink.lab.evaluate.files import read_file
from tests.evaluate.data import lines, problem_file, write_lines


@pytest.mark.parametrize(
    "record, gold",
    [
        ({"question": "q", "answer": "5"}, "5"),
        ({"problem": "q", "answer": 5}, "5"),
        ({"prompt": "q", "answer": 0.5}, "0.5"),
        ({"Question": "q", "Answer": "5"}, "5"),
        ({"question": "q", "Final Answer": "5", "answer": "how"}, "5"),
        ({"question": "q", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"}, "1005"),
        ({"question": "q", "ground_truth": "work\nA: 5", "model": {"solution": "x"}}, "5"),
        ({"question": "q", "solution": r"so \boxed{\frac{1}{2}} is it"}, r"\frac{1}{2}"),
        ({"problem": "q", "solution": r"so \boxed{5}", "answer": "7"}, "7"),
        ({"problem": "r", "question": "q", "answer": "7"}, "7"),
    ],
)
def test_fields_and_answers(tmp_path, record, gold):
    (row,) = read_file(write_lines(tmp_path / "p.jsonl", record))
    assert (row.question, row.gold) == ("q", gold)


@pytest.mark.parametrize("name", ["id", "unique_id", "ID", "problem_id"])
def test_identifiers(tmp_path, name):
    records = [{name: i, "question": "q", "answer": "a"} for i in (7, 3)]
    assert [row.id for row in read_file(write_lines(tmp_path / "p.jsonl", *records))] == ["7", "3"]


def test_without_identifiers_the_question_is_one(tmp_path):
    records = [{"question": q, "answer": "a"} for q in "xyx"]
    first = read_file(write_lines(tmp_path / "p.jsonl", *records))
    second = read_file(write_lines(tmp_path / "p.jsonl", *records[1:]))
    assert first[1] == second[0]
    assert len({row.id for row in first}) == 3


@pytest.mark.parametrize("ids", [{}, {"x": 1}])
def test_a_question_that_stands_twice_is_two_problems_and_said(tmp_path, caplog, ids):
    records = [{"question": q, "answer": "a", **({"id": i} if ids else {})} for i, q in enumerate("xyxx")]
    path = write_lines(tmp_path / "p.jsonl", *records)
    assert len(read_file(path)) == 4
    assert f"2 of 4 problems ask a question that was asked before, first {path}, line 3 (as" in caplog.text
    caplog.clear()
    read_file(write_lines(path, *records[:2]))
    assert not caplog.text


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "q", "answer": "a"}\n\n  \n{"question": "r", "answer": "b"}')
    assert [row.gold for row in read_file(path)] == ["a", "b"]


def test_parquet_and_lines_are_the_same(tmp_path):
    records = [{"problem": f"q{i}", "answer": i, "unique_id": f"u{i}"} for i in range(5)]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "p.parquet")
    assert read_file(tmp_path / "p.parquet") == read_file(write_lines(tmp_path / "p.jsonl", *records))


GOOD = b'{"question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "the file holds no problem; expected one JSON object a line"),
        (b"\n\n", "the file holds no problem"),
        (GOOD + b"{", "line 2: .*; expected one JSON object a line"),
        (b'[{"question": "q", "answer": "a"}]', "line 1: a list, not an object"),
        (GOOD + b"null", "line 2: null, not an object"),
        (GOOD + b"\xff\n", "line 2: byte 0 is not UTF-8"),
        (
            b'{"q": 1, "answer": "a"}',
            "line 1: no field holds the question; expected one of question, .*, found q, answer",
        ),
        (
            b'{"question": "q", "x": "a"}',
            "line 1: no field holds the answer; expected one of final_answer, answer",
        ),
        (b"{}", "line 1: no field holds the question; .* found none"),
        (GOOD + b'{"question": "q"}', "line 2: field 'answer' is missing"),
        (
            GOOD + b'{"question": "q", "answer": null}',
            "line 2: field 'answer' is null; expected text or a number",
        ),
        (GOOD + b'{"question": "q", "answer": true}', "line 2: field 'answer' is true or false"),
        (GOOD + b'{"question": ["q"], "answer": "a"}', "line 2: field 'question' is a list"),
        (GOOD + b'{"question": " ", "answer": "a"}', "line 2: field 'question' is empty"),
        (
            GOOD + b'{"question": "q", "answer": NaN}',
            "line 2: field 'answer' is nan; expected text or a finite",
        ),
        (
            GOOD + b'{"question": "q", "answer": "\\ud800"}',
            "line 2: .* surrogate pair; expected valid Unicode",
        ),
        (b"[" * 100_000, "line 1: .*; expected one JSON object a line"),
        (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "line 1: .*; expected one JSON object a line"),
        (
            b'{"question": "q", "solution": "it is 5"}',
            r"line 1: field 'solution' states no final answer; .*\\boxed",
        ),
        (
            b'{"id": 1, "question": "q", "answer": "a"}\n{"id": 1, "question": "r", "answer": "a"}',
            r"line 2: id='1' is also at .*line 1",
        ),
    ],
    ids=range(20),
)
def test_wrong_files_are_refused_with_their_place(tmp_path, data, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}.*{message}"):
        read_file(path)


def test_wrong_parquet_is_refused_with_its_row(tmp_path):
    path = tmp_path / "p.parquet"
    path.write_bytes(GOOD)
    with pytest.raises(DataError, match=r"p\.parquet: .*; expected a Parquet file"):
        read_file(path)
    parquet.write_table(pa.table({"question": ["q", "r"], "answer": ["a", None]}), path)
    with pytest.raises(DataError, match=r"p\.parquet, row 2: field 'answer' is null"):
        read_file(path)
    parquet.write_table(pa.table({"question": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="at least one row"):
        read_file(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected a \.jsonl or \.parquet file"):
        read_file(tmp_path / "p.csv")
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    "name, count, question, gold_of",
    [
        (
            "gsm8k_test_part.jsonl",
            660,
            "question",
            lambda r: r["answer"].split("####")[1].replace(",", "").strip(),
        ),
        (
            "gsm8k_model_solutions_part.jsonl",
            660,
            "question",
            lambda r: r["ground_truth"].split("A: ")[-1].replace(",", ""),
        ),
        ("math500_part.jsonl", 250, "problem", lambda r: r["answer"]),
        ("aime24_part.jsonl", 15, "question", lambda r: r["answer"]),
    ],
)
def test_the_real_files(name, count, question, gold_of):
    path = problem_file(name)
    rows, records = read_file(path), lines(path)
    assert len(rows) == len(records) == count
    assert [row.question for row in rows] == [record[question].strip() for record in records]
    assert [row.gold for row in rows] == [gold_of(record) for record in records]


def test_both_gsm8k_files_have_the_same_problems():
    names = ("gsm8k_test_part", "gsm8k_model_solutions_part")
    asked, solved = (read_file(problem_file(f"{name}.jsonl")) for name in names)
    assert [replace(item, task=names[1]) for item in asked] == solved


def test_the_box_of_a_math_solution_is_its_answer(tmp_path):
    """Nested braces and all: the solution's last box is what the field `answer` says."""
    records = lines(problem_file("math500_part.jsonl"))
    bare = [{key: r[key] for key in ("unique_id", "problem", "solution")} for r in records]
    boxed = read_file(write_lines(tmp_path / "p.jsonl", *bare))
    same = sum(row.gold == record["answer"] for row, record in zip(boxed, records, strict=True))
    assert same >= 0.95 * len(records)  # the others differ in spacing or in units
