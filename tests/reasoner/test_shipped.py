"""The weights in the package are small, safe, and solve held-out problems as often as the model card says."""

import json
from importlib.resources import files

import pytest
import torch
from safetensors import safe_open

from longthink.lab.results.statistics import wilson
from longthink.reasoner import PROFILES, Size, load_reasoner, make_problem, make_problems
from longthink.reasoner.task import grade
from longthink.reasoner.vocabulary import TOKENS
from tests.examples import TIMES
from tools.train_reasoner.evaluate import evaluate, solve

FOLDER = files("longthink.reasoner") / "weights"
SEED = 77_000
"""Away from the seeds of the model card."""


@pytest.fixture(scope="module")
def reasoner():
    return load_reasoner()


def share_right(reasoner, problems):
    texts = solve(*reasoner, problems)
    return sum(grade(problem, text) for problem, text in zip(problems, texts, strict=True)) / len(problems)


def test_short_problems_of_every_profile_are_solved(reasoner):
    problems = [p for profile in PROFILES for p in make_problems(12, profile=profile, size="s", seed=SEED)]
    assert share_right(reasoner, problems) >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
def test_large_problems_are_solved(reasoner, profile):
    problems = make_problems(50 if TIMES > 1 else 12, profile=profile, size="l", seed=SEED)
    assert share_right(reasoner, problems) > 0.9, (
        "the card has 99.5 %: two wrong ones of twelve are no chance"
    )


@pytest.mark.slow
def test_brief_or_checked_as_asked(reasoner):
    """The same program, one token apart in the prompt: other words, same answer."""
    model, tokenizer = reasoner
    for checked in (False, True):
        problem = make_problem(profile="lemma", size=Size(ops=6, checked=checked), seed=SEED)
        (text,) = solve(model, tokenizer, [problem])
        assert text == f"{problem.solution} </s>"


@pytest.mark.slow
def test_padding_does_not_change_the_answer(reasoner):
    model, tokenizer = reasoner
    short = make_problem(profile="chain", size=Size(ops=3), seed=SEED)
    long = make_problem(profile="chain", size=Size(ops=9), seed=SEED, distractors=60)
    texts = solve(model, tokenizer, [short, long])
    assert [text.replace(" <pad>", "") for text in texts] == [f"{p.solution} </s>" for p in (short, long)]


def test_half_precision_loads():
    model, _ = load_reasoner(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"dtype=torch.int64"):
        load_reasoner(torch.int64)


def test_folder_is_small_and_holds_nothing_but_data():
    names = {path.name: len(path.read_bytes()) for path in FOLDER.iterdir()}
    assert sum(names.values()) <= 12 * 2**20
    assert {name.rpartition(".")[2] for name in names} == {"json", "md", "safetensors"}
    with safe_open(str(FOLDER / "model.safetensors"), framework="pt") as weights:
        assert weights.get_slice("model.embed_tokens.weight").get_shape()[0] == len(TOKENS)


def test_model_card_states_what_was_measured():
    card = (FOLDER / "README.md").read_text()
    evaluation = json.loads((FOLDER / "evaluation.json").read_text())
    rows = {(row["size"], row["profile"]): row for row in evaluation["rows"]}
    for profile in PROFILES:
        row = rows["l", profile]
        assert row["problems"] >= 200 and row["right"] / row["problems"] >= 0.98
        assert wilson(row["right"], row["problems"]) == pytest.approx((row["low"], row["high"]), abs=1e-4)
        assert f"| l | {profile} | {row['problems']} | {100 * row['right'] / row['problems']:.1f} %" in card


@pytest.mark.slow
def test_evaluation_writes_numbers_and_card(tmp_path):
    for path in FOLDER.iterdir():
        if path.name not in ("README.md", "evaluation.json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    result = evaluate(tmp_path, problems={"s": 2}, seed=SEED)
    assert [row["profile"] for row in result["rows"]] == [*PROFILES, "second question"]
    assert all(row["right"] == row["every_token_right"] == 2 for row in result["rows"])
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    assert "| s | phoenix | 2 | 100.0 % |" in (tmp_path / "README.md").read_text()
