"""The chain trace, what-if, report from the command line."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from longthink.lab.analyze.recorder import Prompt, record
from longthink.lab.analyze.rules import Rules
from longthink.lab.analyze.store import TraceStore
from tests.analyze.making import Words
from tests.evaluate.data import write_lines
from tests.models import build
from tests.vision import IMAGE, build_vision, inputs_with, picture


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Two problems in a file."""
    lines = [{"question": f"hello there {i}", "answer": str(i)} for i in range(2)]
    return write_lines(tmp_path_factory.mktemp("data") / "mine.jsonl", *lines)


@pytest.fixture(scope="module", params=["qwen2", "mistral", "qwen2_vl"])
def model_folder(request, bpe_model, tmp_path_factory):
    """A small random model on disk, with a tokenizer that reads anything."""
    folder = tmp_path_factory.mktemp(request.param)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{bpe_model}/{name}", folder / name)
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    make = build_vision if request.param.endswith("vl") else build
    make(request.param, vocab_size=max(100, len(words) + 4)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_chain_on_models_from_disk(call, tmp_path, model_folder, problems):
    traces = tmp_path / "traces"
    words = ("--model", model_folder, "--data", problems, "--tasks", "mine", "--max-new-tokens", 40)
    code, out, err = call("trace", *words, "--with-vectors", "--out", traces)
    assert code == 0, err
    assert out.count("mine") == 2 and "2 traces in" in out
    headers = [trace.header for trace in TraceStore(traces).traces()]
    assert [header.problem for header in headers] != [] and all(
        len(h.token_ids) > h.prompt_tokens for h in headers
    )

    policies = "recency,milestone:page_size=4,raas:page_size=4:score=exact"
    (tmp_path / "classes.toml").write_text("use = 0.2")
    classes = ("--classes", tmp_path / "classes.toml")
    code, out, err = call("what-if", traces, "--policies", policies, "--decode-budgets", "8,16", *classes)
    assert code == 0, err
    for name in ("recency", "milestone", "raas", "belady", "optimum"):
        assert name in out

    code, out, err = call("report", traces, "--out", tmp_path / "report")
    assert code == 0, err
    assert out.strip() == str(tmp_path / "report" / "attention.html")
    assert (tmp_path / "report" / "figures" / "recall-decode-budget.pdf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_the_chain_on_images(call, tmp_path, name):
    """Traces with images come from Python; all that follows reads them as any other."""
    build_vision(name).save_pretrained(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    model.generation_config.eos_token_id = None
    traces, prompts = tmp_path / "traces", []
    for i in range(2):
        inputs = inputs_with(picture(84, 112, seed=i), seed=i)
        prompts.append(Prompt(task="seen", problem=str(i), inputs=inputs, max_new_tokens=40))
    record(model, Words(), prompts, traces, vectors=True, top=0)
    policies = "recency,milestone:page_size=4,h2o"
    (tmp_path / "classes.yaml").write_text("use: 0.1\nlocal: 30")
    classes = ("--classes", tmp_path / "classes.yaml")
    code, out, err = call(
        "what-if", traces, "--policies", policies, "--decode-budgets", "8,16", *classes, "--json"
    )
    assert code == 0, err
    defaults = {"gap": 128, "sink": 0.5, "far": 0.1, "majority": 0.67}
    assert json.loads(out)["rules"] == {"use": 0.1, "local": 30} | defaults
    rows = json.loads(out)["rows"]
    assert [row["problems"] for row in rows] == [2] * 10 and all(
        0 < row["recall"] <= 1 + 1e-6 for row in rows
    )
    code, out, err = call("report", traces, "--out", tmp_path / "report")
    assert code == 0, err
    classes = (tmp_path / "report" / "tables" / "page-classes.md").read_text()
    assert "| model | image |" in classes and "| model | text |" in classes
    page = (tmp_path / "report" / "attention.html").read_text()
    shown = json.loads(page.split('id="attention">')[1].split("</script>")[0])["traces"]
    images = (prompts[0].inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
    assert shown[0]["image"] == images and len(images) == 12


@pytest.mark.slow
def test_the_chain_on_the_built_in_model(call, tmp_path):
    traces = tmp_path / "traces"
    code, _, err = call(
        "trace", "--tasks", "reasoner/s/chain", "-n", 1, "--max-new-tokens", 60, "--out", traces
    )
    assert code == 0, err
    code, out, err = call("what-if", traces, "--budgets", "96", "--policies", "recency", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["policy"] for row in rows] == ["recency", "belady", "optimum"]
    assert 0 < rows[0]["recall"] <= rows[2]["recall"] <= 1 + 1e-6


@pytest.mark.slow
def test_what_was_kept_against_answers(call, tmp_path):
    words = ("--tasks", "reasoner/s/chain", "-n", 1, "--max-new-tokens", 120)
    code, _, err = call("trace", *words, "--out", tmp_path / "traces")
    assert code == 0, err
    setup = ("--policies", "recency,random", "--budgets", "96,128")
    code, _, err = call("eval", *words, *setup, "--out", tmp_path / "answers")
    assert code == 0, err
    code, out, err = call("what-if", tmp_path / "traces", *setup, "--answers", tmp_path / "answers", "--json")
    assert code == 0, err
    found = json.loads(out)["correlations"]
    assert [(one["measure"], one["cells"], one["problems"]) for one in found] == [
        (measure, 4, 1) for measure in ("recall", "lookups", "regrets")
    ]
    code, out, err = call("what-if", tmp_path / "traces", *setup, "--answers", tmp_path / "answers")
    assert code == 0 and "4 policies at budgets, 1 problems" in out
    code, _, err = call("what-if", tmp_path / "traces", *setup, "--answers", tmp_path / "traces")
    assert code != 0 and "is not a result store" in err


@pytest.mark.parametrize(
    "words, named",
    [
        (("what-if", "gone"), "no budget is given"),
        (("what-if", "gone", "--budgets", "64"), "gone holds no traces"),
        (("what-if", "gone", "--budgets", "6x"), "budgets='6x' must be numbers"),
        (("trace", "--tasks", "reasoner/s", "--page-size", "64"), "page_size=64"),
        (("trace", "--tasks", "nothing"), "task='nothing' is unknown"),
    ],
)
def test_bad_input_is_named(call, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert code not in (0, None) and out == ""
    assert named in err


@pytest.mark.parametrize(
    "text, named",
    [
        ("gap = 0", "gap=0 is out of range: allowed is >= 1"),
        ('use = "much"', "use='much' is out of range"),
        ("gaps = 3", "unknown setting 'gaps': did you mean 'gap'?"),
    ],
)
def test_a_bad_file_of_classes_is_named(call, tmp_path, text, named):
    (tmp_path / "classes.toml").write_text(text)
    code, out, err = call("what-if", "gone", "--budgets", "64", "--classes", tmp_path / "classes.toml")
    assert (code, out) == (2, "") and named in err


@pytest.mark.parametrize("command", ["advise", "what-if", "trace", "eval"])
def test_help_fits_on_one_screen(call, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = call(command, "--help")
    assert code == 0 and len(out.splitlines()) <= 50


def test_defaults_of_classes_are_printed_and_documented(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = call("what-if", "--help")
    page = (Path(__file__).parents[2] / "docs" / "analyze.md").read_text()
    for name, value in dataclasses.asdict(Rules()).items():
        assert f"{name}={value}" in out
        assert f"{name} = {value}" in page


def test_traces_are_not_compared(call, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "longthink-trace").write_text("{}")
    code, _, err = call("report", tmp_path / "t", "--against", tmp_path)
    assert code != 0 and "--against" in err
