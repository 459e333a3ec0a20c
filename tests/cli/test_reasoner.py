"""``longthink reasoner`` and the built-in model in ``longthink generate``."""

import json
from importlib.resources import files

import pytest

from longthink.reasoner import grade, make_problem


def test_problem_is_readable_and_seeded(call):
    code, out, err = call("reasoner", "problem", "--profile", "lemma", "--size", "s", "--seed", 5)
    assert (code, err) == (0, "")
    made = make_problem(profile="lemma", size="s", seed=5)
    assert out == f"Problem\n{made.prompt}\n\nSolution\n{made.solution}\n\nAnswer\n{made.answer}\n"
    assert call("reasoner", "problem", "--profile", "lemma", "--size", "s", "--seed", 6)[1] != out


def test_generate_makes_a_problem_and_solves_it(call):
    code, out, err = call("generate", "--profile", "phoenix", "--size", "s", "--seed", 2)
    made = make_problem(profile="phoenix", size="s", seed=2)
    assert code == 0
    assert out.startswith(f"{made.prompt}\n\n")
    assert out.endswith(f"{made.solution}\n")
    assert "no prompt given: here is a problem (profile phoenix, size s, seed 2)" in err
    assert f"the answer is {made.answer}: the model is right" in err


@pytest.mark.slow
def test_generate_with_a_problem_as_prompt(call):
    made = make_problem(profile="chain", size="s", seed=7)
    code, out, _ = call("generate", made.prompt, "--json")
    assert code == 0
    record = json.loads(out)
    assert "problem" not in record
    assert record["stopped"] == "end"
    assert record["decode_budget"] == 256
    assert grade(made, record["text"])
    assert record["model"]["name"] == "reasoner"


@pytest.mark.slow
def test_json_of_a_made_problem(call):
    _, out, _ = call("generate", "--size", "s", "--json")
    problem = json.loads(out)["problem"]
    assert problem["right"] is True
    assert (problem["profile"], problem["size"], problem["seed"]) == ("chain", "s", 0)


def test_words_it_does_not_know(call):
    code, out, err = call("generate", "what is the meaning of life")
    assert code == 2
    assert out == ""
    assert "the built-in model does not know 'what', 'is', 'the'" in err


@pytest.mark.slow
def test_its_own_folder_is_a_model_like_any_other(call):
    made = make_problem(profile="chain", size="s", seed=7)
    folder = files("longthink.reasoner") / "weights"
    code, out, _ = call("generate", made.prompt, "--model", folder, "--decode-budget", 256)
    assert code == 0
    assert grade(made, out)
