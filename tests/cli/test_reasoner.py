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


@pytest.mark.slow
def test_eval(call):
    code, out, _ = call("reasoner", "eval", "--size", "s", "--problems", 2, "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["profile"] for row in rows] == ["chain", "lemma", "recurrent", "phoenix"]
    assert all(row["right"] == row["problems"] == 2 and 0 < row["low"] < row["high"] == 1 for row in rows)
    code, out, _ = call("reasoner", "eval", "--size", "s", "--problems", 1)
    assert code == 0
    assert "phoenix" in out
    assert "1/1" in out


@pytest.mark.slow
def test_eval_compares_policies_at_one_budget(call):
    asked = (
        "--size",
        "s",
        "--problems",
        3,
        "--policies",
        "dense,recency,streaming_llm",
        "--decode-budget",
        48,
    )
    code, out, _ = call("reasoner", "eval", *asked, "--json")
    assert code == 0
    record = json.loads(out)
    right = {spec: 0 for spec in ("dense", "recency", "streaming_llm")}
    for row in record["rows"]:
        right[row["spec"]] += row["right"]
    assert right["dense"] == 12
    # 48 tokens are two lines: what was worked out before is gone, and with streaming_llm the problem as well.
    assert right["streaming_llm"] == 0
    assert right["recency"] < 12
    assert record["decode_budget"] == 48 and record["budget"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--policies", "raas"), "exactly one of budget"),
        (("--policies", "nonsense"), "unknown policy 'nonsense'"),
        (("--policies", " , "), "policies is empty"),
        (("--problems", 0), "problems=0"),
    ],
)
def test_eval_refuses_what_makes_no_sense(call, words, message):
    code, out, err = call("reasoner", "eval", *words)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.slow
def test_train_resumes_and_its_model_generates(call, tmp_path):
    settings = ("--batch-tokens", 256, "--last-ops", 4, "--no-compile", "--save-every", 5)
    small = (*settings, "--layers", 2, "--hidden", 64, "--mlp", 64)
    run = tmp_path / "run"
    code, out, err = call("reasoner", "train", run, "--tokens", 8000, *small)
    assert code == 0, err
    assert out.strip() == str(run / "model")
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 1
    code, _, err = call("reasoner", "train", run, "--tokens", 9000, *small)
    assert code == 2
    assert "tokens=9000" in err
    code, out, _ = call(
        "reasoner", "eval", "--model", run / "model", "--size", "s", "--problems", 1, "--json"
    )
    assert code == 0
    assert json.loads(out)["rows"][0]["right"] == 0


def test_train_refuses_bad_settings(call, tmp_path):
    code, _, err = call("reasoner", "train", tmp_path / "run", "--tokens", 0)
    assert code == 2
    assert "tokens=0" in err
