"""Bad input is one clear line on standard error and exit code 2, whoever noticed it."""

import errno
import shutil
import sys

import pytest

from longthink.policies import available_policies

CASES = {
    "unknown command": ("bogus", 'Unknown command "bogus"'),
    "unknown option": ("generate --budgit 4", "Unknown option: --budgit. Did you mean --budget?"),
    "not a number": ("generate x --budget many", '"many"'),
    "two prompts": ("generate hello there", "there"),
    "prompt twice": ("generate hello --file {text}", "give the prompt once"),
    "no prompt": ("generate --model {model}", "there is no prompt"),
    "empty prompt": ("generate --model {model} --file {empty}", "is empty"),
    "prompt not text": ("generate --model {model} --file {binary}", "is not UTF-8 text (byte 0)"),
    "no such file": ("generate --file {missing}", "no such file or folder: {missing}"),
    "file is a folder": ("generate --file {model}", "Is a directory"),
    "both budgets": ("generate hello --budget 64 --decode-budget 64", "exactly one of budget"),
    "budget of nothing": ("generate hello --budget 0", "budget=0 is out of range"),
    "budget for dense": (
        "generate hello --model {model} --policy dense --budget 64",
        "'dense' keeps everything",
    ),
    "budget too small": ("generate hello --model {model} --budget 8", "budget=8"),
    "unknown policy": ("generate hello --policy best", "unknown policy 'best'"),
    "unknown policy option": ("generate hello --policy raas:x=1", "no option 'x'"),
    "policy out of range": ("generate hello --policy raas:r=7", "r=7"),
    "cold": ("generate hello --temperature -1", "temperature=-1"),
    "top p when greedy": ("generate hello --top-p 0.9", "give a temperature above 0"),
    "top p out of range": ("generate hello --temperature 1 --top-p 2", "top_p=2"),
    "no tokens wanted": ("generate hello --max-new-tokens 0", "max_new_tokens=0"),
    "prompt in pieces of nothing": ("generate hello --prefill-chunk-size 0", "prefill_chunk_size=0"),
    "unknown profile": ("generate --profile x", "chain"),
    "unknown dtype": ("generate hello --dtype int4", "bfloat16"),
    "no such device": (
        "generate hello --model {model} --device abacus",
        "device 'abacus' cannot be used here",
    ),
    "policy option twice": (
        "generate hello --policy raas:r=0.5:r=0.6",
        "option 'r' of 'raas:r=0.5:r=0.6' is given twice",
    ),
    "nothing bounded": (
        "generate hello --model {model} --policy raas:dense_layers=2 --budget 64",
        "keeps everything in all 2 layers of the model",
    ),
    "argument not text": ("generate \udcff", r"argument 2 is not UTF-8 text: \xff"),
    "lm-eval without a budget": (
        "lm-eval --model longthink --model_args pretrained=reasoner,policy=raas --tasks gsm8k",
        "policy 'raas' needs a budget",
    ),
    "lm-eval with a bad budget": (
        "lm-eval run -M longthink -a policy=raas budget=0",
        "budget=0 is out of range",
    ),
    "lm-eval in JSON": (
        'lm-eval --model longthink --model_args {{"budget":8,"decode_budget":8}}',
        "exactly one of",
    ),
    "no such folder": ("generate hello --model {missing}", "there is no such folder"),
    "folder without model": ("generate hello --model {folder}", "has no config.json"),
    "folder without weights": ("generate hello --model {weightless}", "safetensors"),
    "not on the hub": ("generate hello --model nobody/nothing-of-that-name", "it is not on this machine"),
    "not a model id": ("generate hello --model a/b/c", "is not a valid id of a model"),
    "sliding window": ("generate hello --model {sliding} --decode-budget 32", "a window of 8 tokens"),
    "demo without policies": ("demo --policies ,", "policies is empty"),
    "demo with an unknown policy": ("demo --policies dense,best", "unknown policy 'best'"),
    "demo picture nowhere": ("demo --png {missing}/x.png", "there is no folder"),
    "demo without workers": ("demo --workers 0", "workers=0 is out of range"),
    "demo with both budgets": ("demo --budget 64 --decode-budget 64", "exactly one of budget"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, plain_model):
    from transformers import MistralConfig, MistralForCausalLM

    base = tmp_path_factory.mktemp("bad")
    (base / "text").write_text("hello")
    (base / "empty").write_text(" \n")
    (base / "binary").write_bytes(b"\xff\xfe\x00")
    (base / "folder").mkdir()
    shutil.copytree(plain_model, base / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(
        plain_model, base / "sliding", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(vocab_size=68, sliding_window=8, **sizes, **heads)
    MistralForCausalLM(config).save_pretrained(base / "sliding")
    made = ("text", "empty", "binary", "folder", "weightless", "sliding", "missing")
    return {"model": plain_model, **{name: str(base / name) for name in made}}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(call, places, case):
    command, message = CASES[case]
    code, out, err = call(*(word.format(**places) for word in command.split()))
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("no budget given")]
    assert len(lines) == 1, err
    assert lines[0].startswith("longthink: ")
    assert message.format(**places) in lines[0]


def test_lm_eval_is_not_loaded_for_what_can_be_refused_before(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "longthink.lab.evaluate.harness", None)
    assert "needs a budget" in call("lm-eval", "--model", "longthink")[2]
    # Other models are none of our business, and a file may say more.
    for words in (["--model", "hf"], ["--model", "longthink", "--config", "x.yaml"]):
        assert "longthink.lab.evaluate.harness" in call("lm-eval", *words)[2]


@pytest.mark.parametrize(
    ("closed", "words", "message"),
    [
        ("stdin", ["generate", "-"], "standard input is closed: pass the prompt"),
        ("stdin", ["generate", "--chat"], "standard input is closed: pass the question"),
        ("stdout", ["policies"], "standard output is closed: send it"),
    ],
)
def test_a_closed_stream_is_named(call, monkeypatch, closed, words, message):
    monkeypatch.setattr(sys, closed, None)
    code, _, err = call(*words)
    assert code == 2
    assert err.startswith(f"longthink: {message}") and err.count("\n") == 1


def test_notes_do_not_go_where_results_go(call, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    code, out, _ = call("bogus")
    assert (code, out) == (2, "")


def test_a_full_disk_says_so(call, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("longthink.policies.available_policies", full)
    code, _, err = call("policies")
    assert code == 1
    assert err == "longthink: No space left on device: free some space and run the same command again\n"


def test_unknown_policy_names_those_there_are(call):
    assert all(name in call("generate", "hello", "--policy", "best")[2] for name in available_policies())


def test_debug_shows_the_traceback(call):
    code, _, err = call("generate", "hello", "--policy", "best", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("longthink: unknown policy 'best'")


def test_message_cannot_command_the_terminal(call):
    code, _, err = call("generate", "hello", "--policy", "\x1b]0;owned\x07\x9b31m")
    assert code == 2
    assert "owned" in err
    assert not set(err) & {"\x1b", "\x07", "\x9b"}


def test_a_bug_is_said_to_be_one(call, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("it broke")

    monkeypatch.setattr("longthink.policies.available_policies", broken)
    code, _, err = call("policies")
    assert code == 1
    assert err == "longthink: unexpected RuntimeError: it broke (run again with --debug for the traceback)\n"


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), type("OutOfMemoryError", (RuntimeError,), {})("no room")]
)
def test_out_of_memory_says_so(call, monkeypatch, error):
    def full(*arguments):
        raise error

    monkeypatch.setattr("longthink.policies.available_policies", full)
    code, _, err = call("policies")
    assert code == 1
    assert err.startswith("longthink: out of memory (no room)")


def test_missing_package_is_named(call, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "packaging.requirements", None)
    code, _, err = call("doctor")
    assert code == 1
    assert "packaging.requirements" in err
    assert "not installed" in err
