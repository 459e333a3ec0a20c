"""``longthink generate`` with a small random model in a folder."""

import io
import json
import math
import re
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longthink import __version__
from longthink.cli.terminal import write_text
from longthink.policies import make_policy, policy_to_dict


def reference(folder, prompt, count, **kwargs):
    """Text of the library's own generate, with its own cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=count, **{"do_sample": False, **kwargs})
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_streams_the_text_and_ends_with_the_figures(call, plain_model):
    code, out, err = call(
        "generate", "hello there", "--model", plain_model, "--max-new-tokens", 60, "--decode-budget", 16
    )
    assert code == 0
    assert len(out.split()) > 10
    assert out.endswith("\n")
    last = err.splitlines()[-1]
    assert last.startswith("60 tokens (token limit reached) · ")
    assert "tokens/s · KV cache " in last
    assert ", dense would be " in last
    assert last.endswith(" evictions")
    assert not last.endswith(" 0 evictions")


def test_a_cache_that_is_larger_than_dense_says_why(call, plain_model):
    command = ("generate", "hello there", "--model", plain_model, "--policy", "raas", "--decode-budget", 64)
    short = call(*command, "--max-new-tokens", 8)[2].splitlines()
    assert short[-2].startswith("8 tokens")
    assert short[-1].startswith(
        "the bounded cache is larger than a dense one here because its slots are allocated"
    )
    (length,) = re.findall("pays off from ([0-9]+) tokens on, prompt included", short[-1])
    # The last token of a text is never stored: the cache of a prompt of 2 and n new tokens holds n + 1.
    for new, larger in ((int(length) - 2, True), (int(length) - 1, False)):
        assert ("larger than a dense" in call(*command, "--max-new-tokens", new)[2]) == larger


@pytest.mark.slow
def test_compiling_is_announced_on_standard_error_and_once(call, plain_model, monkeypatch):
    monkeypatch.setattr("longthink.hf.step.few_rows_backend", "eager")
    command = (
        "generate",
        "hello there",
        "--model",
        plain_model,
        "--decode-budget",
        16,
        "--max-new-tokens",
        4,
    )
    code, out, err = call(*command, "--compile", "on", "--debug")
    assert code == 0
    assert err.count("compiling the decode step") == 1
    assert "about a minute" in err and "--compile off" in err and "compiling" not in out
    assert "compiling" not in call(*command, "--compile", "off")[2]
    assert "compiling" not in call(*command)[2]
    torch.compiler.reset()


def test_a_prompt_read_in_pieces_gives_the_same_text(call, plain_model):
    call_ = (
        "generate",
        "hello there, " * 9,
        "--model",
        plain_model,
        "--max-new-tokens",
        20,
        "--decode-budget",
        16,
    )
    whole = call(*call_)[1]
    assert call(*call_, "--prefill-chunk-size", 7)[1] == whole


@pytest.mark.slow
def test_text_is_that_of_the_library_when_nothing_is_evicted(call, plain_model):
    expected = reference(plain_model, "hello there", 40)
    for policy in ("raas", "dense"):
        budget = () if policy == "dense" else ("--decode-budget", 64)
        call_ = (
            "generate",
            "hello there",
            "--model",
            plain_model,
            "--policy",
            policy,
            "--max-new-tokens",
            40,
        )
        assert call(*call_, *budget)[1] == expected + "\n"


def test_qwen2_with_parts_of_characters(call, bpe_model):
    """Streamed text adds up to the library's text even where a token is only a part of a character."""
    torch.manual_seed(3)
    expected = reference(bpe_model, "größe 数学", 120, do_sample=True, temperature=3.0, top_k=0)
    assert "\N{REPLACEMENT CHARACTER}" in expected
    code, out, _ = call(
        "generate", "größe 数学", "--model", bpe_model, "--max-new-tokens", 120, "--policy", "dense", "--json",
        "--temperature", 3, "--seed", 3,
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["text"] == expected


def test_json_is_one_complete_document(call, plain_model):
    code, out, _ = call(
        "generate", "hello there w1", "--model", plain_model, "--policy", "raas:r=0.25:page_size=4",
        "--budget", 24, "--max-new-tokens", 50, "--json",
    )  # fmt: skip
    assert code == 0
    record = json.loads(out)
    assert record["tokens"] == {"prompt": 3, "generated": 50}
    assert record["stopped"] == "length"
    assert len(record["text"].split()) > 10
    assert record["policy"] == policy_to_dict(make_policy("raas:r=0.25:page_size=4"))
    assert (record["budget"], record["decode_budget"]) == (24, None)
    assert (
        record["bytes"]["kv_bytes"] == 2 * 2 * 2 * 24 * 16 * 4
    )  # K and V, layers, KV heads, tokens, head_dim, fp32
    assert record["bytes"]["dense_kv_bytes"] > record["bytes"]["kv_bytes"]
    assert record["evictions"] > 0
    assert record["versions"]["longthink"] == __version__
    assert record["model"]["dtype"] == "float32"
    assert all(math.isfinite(value) and value >= 0 for value in record["timing"].values())


def test_default_budget_is_chosen_and_said(call, plain_model):
    code, out, err = call("generate", "hello", "--model", plain_model, "--max-new-tokens", 2, "--json")
    assert code == 0
    assert json.loads(out)["decode_budget"] == 1024
    assert "no budget given: keeping 1024 tokens on top of the prompt" in err
    code, out, err = call(
        "generate", "hello", "--model", plain_model, "--max-new-tokens", 2, "--json", "--policy", "dense"
    )
    assert json.loads(out)["decode_budget"] is None
    assert "no budget" not in err


@pytest.mark.slow
def test_sampling_is_seeded(call, plain_model):
    def text(seed, *more):
        return call(
            "generate", "hello", "--model", plain_model, "--max-new-tokens", 30, "--decode-budget", 64,
            "--temperature", 1.5, "--seed", seed, *more,
        )[1]  # fmt: skip

    assert text(1) == text(1)
    assert text(1) != text(2)
    greedy = call("generate", "hello", "--model", plain_model, "--max-new-tokens", 30, "--decode-budget", 64)[
        1
    ]
    assert text(1, "--top-k", 1) == greedy
    assert text(1, "--top-p", 1e-6) == greedy


def test_dtype(call, plain_model):
    code, out, _ = call(
        "generate", "hello", "--model", plain_model, "--max-new-tokens", 4, "--dtype", "bfloat16", "--json"
    )
    assert code == 0
    assert json.loads(out)["model"]["dtype"] == "bfloat16"


def test_chat_template_unless_raw(call, chat_model):
    def prompt_tokens(*more):
        return json.loads(
            call("generate", "hello there", "--model", chat_model, "--max-new-tokens", 1, "--json", *more)[1]
        )["tokens"]["prompt"]

    assert prompt_tokens() == 4  # user hello there bot
    assert prompt_tokens("--raw") == 2


@pytest.mark.slow
def test_prompt_from_file_and_stdin(call, plain_model, tmp_path, monkeypatch):
    common = ("--model", plain_model, "--max-new-tokens", 20, "--decode-budget", 32)
    expected = call("generate", "hello there", *common)[1]
    path = tmp_path / "prompt.txt"
    path.write_text("hello there\n")
    assert call("generate", "--file", path, *common)[1] == expected
    for source in (["-"], ["--file", "-"], ["--file=-"], []):
        with path.open() as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            assert call("generate", *source, *common)[1] == expected, source


def test_prompt_that_looks_like_an_option(call, plain_model):
    code, out, _ = call("generate", "--model", plain_model, "--max-new-tokens", 3, "--json", "--", "-hello")
    assert code == 0
    assert json.loads(out)["tokens"]["prompt"] == 1


def test_end_token_ends_the_text(call, plain_model, tmp_path, words):
    """A model whose head can only say the end token stops after it."""
    model = AutoModelForCausalLM.from_pretrained(plain_model)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = model.model.embed_tokens.weight[6]
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(plain_model).save_pretrained(tmp_path)
    code, out, _ = call("generate", "hello", "--model", tmp_path, "--json", "--max-new-tokens", 9)
    record = json.loads(out)
    assert (code, record["stopped"], record["tokens"]["generated"], record["text"]) == (0, "end", 1, "")


def test_long_context_is_pointed_out(call, plain_model):
    _, _, err = call("generate", "hello", "--model", plain_model, "--max-new-tokens", 1)
    assert "was made for" not in err


@pytest.mark.slow
def test_prompt_through_a_pipe_and_quiet_libraries(start, plain_model):
    arguments = ("generate", "--model", plain_model, "--max-new-tokens", "5", "--decode-budget", "16")
    out, err = start(*arguments, stdin=subprocess.PIPE).communicate(b"hello there w1 w2\n", timeout=120)
    assert len(out.decode().splitlines()) == 1
    assert out.decode().strip()
    lines = [line for line in err.decode().splitlines() if not line.startswith(("loading ", "generating"))]
    assert len(lines) == 2
    assert lines[0].startswith("5 tokens")
    assert lines[1].startswith("the bounded cache is larger than a dense one here because")


def test_text_to_a_pipe_is_unchanged(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    write_text("a\x1b[31m\n")
    assert stream.getvalue() == "a\x1b[31m\n"
