"""``longthink calibrate``, and generating with what it writes."""

import json

import pytest
import torch
from safetensors.torch import load_file

TEXTS = ["hello there w1 w2 w3 w4 w5", "w6 w7 w8"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "more": 1}) + "\n\n" for text in TEXTS))
    return path


@pytest.fixture
def made(call, plain_model, data, tmp_path):
    out = tmp_path / "stats.safetensors"
    code, said, err = call("calibrate", plain_model, "--data", data, "--out", out)
    assert (code, said) == (0, "")
    assert f"{out}: 2 layers, from 10 tokens of 2 texts" in " ".join(err.split())
    return out


def test_it_writes_one_tensor_per_layer_and_replaces_it_as_a_whole(call, plain_model, data, made):
    first = load_file(made)
    assert sorted(first) == ["layer.0", "layer.1"]
    assert call("calibrate", plain_model, "--data", data, "--out", made, "--max-tokens", 1)[0] == 0
    second = load_file(made)
    assert not any(torch.equal(first[name], second[name]) for name in first)
    assert [path.name for path in made.parent.iterdir() if path.name.endswith(".tmp")] == []


def test_what_it_writes_serves_to_generate(call, plain_model, made):
    policy = f"tri_attention:window=2:stats={made}"
    code, out, err = call(
        "generate", "hello there", "--model", plain_model, "--policy", policy, "--decode-budget", 8,
        "--max-new-tokens", 20, "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert json.loads(out)["policy"]["stats"] == str(made)


def test_another_model_is_refused(call, bpe_model, made):
    code, _, err = call(
        "generate",
        "hello",
        "--model",
        bpe_model,
        "--policy",
        f"tri_attention:stats={made}",
        "--decode-budget",
        8,
    )
    assert code == 2
    assert "holds no statistics for this model: class was 'Qwen3ForCausalLM' and is 'Qwen2ForCausalLM'" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "texts.jsonl, line 1: Expecting property name"),
        ('{"text": "hello"}\n[1]', 'line 2: expected an object with a "text" that is a string'),
        ('{"text": 3}', "line 1: expected an object"),
        ("\n", "there is no text to calibrate on"),
        ('{"text": ""}', "there is no text to calibrate on"),
    ],
)
def test_wrong_data_is_refused_with_the_line(call, plain_model, data, text, message):
    data.write_text(text)
    out = data.with_name("out.safetensors")
    code, _, err = call("calibrate", plain_model, "--data", data, "--out", out)
    assert code == 2
    assert message in err
    assert not out.exists()


def test_a_folder_that_is_not_there_is_named(call, plain_model, data):
    out = data.parent / "none" / "out.safetensors"
    code, _, err = call("calibrate", plain_model, "--data", data, "--out", out)
    assert code == 2
    assert f"cannot write statistics to '{out}'" in err and "No such file or directory" in err


def test_max_tokens_is_checked_before_anything_is_read(call, plain_model, data):
    code, _, err = call("calibrate", plain_model, "--data", data, "--out", data, "--max-tokens", 0)
    assert (code, err) == (2, "longthink: max_tokens=0 is out of range: allowed is >= 1\n")
