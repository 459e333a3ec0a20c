"""``longthink vllm-args``: what it prints is what vLLM reads."""

import json
import shlex
import subprocess

import pytest

from longthink.policies import make_policy


def read(words):
    """The words as vLLM's parser reads them: dots are levels of a JSON object."""
    options, additional = {}, {}
    for name, value in zip(words[::2], words[1::2], strict=True):
        if name.startswith("--additional-config."):
            _, plugin, field = name.split(".")
            try:
                additional.setdefault(plugin, {})[field] = json.loads(value)
            except json.JSONDecodeError:
                additional.setdefault(plugin, {})[field] = value
        else:
            options[name] = value
    return options, additional


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ((), {"policy": "recall", "decode_budget": 512}),
        (("--policy", "raas:r=0.25:sharing=layer"), {"policy": "raas:r=0.25:sharing=layer", "decode_budget": 512}),
        (
            ("--policy", "raas", "--max-prompt-tokens", 4096, "--reserve", "--tp-sync"),
            {
                "policy": "raas", "decode_budget": 512, "max_prompt_tokens": 4096, "reserve": True, "tp_sync": True,
            },
        ),
    ],
)  # fmt: skip
def test_line_and_json_mean_the_same(call, arguments, meant):
    code, out, err = call("vllm-args", "--decode-budget", 512, *arguments)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    # Pasted into a shell and substituted by one: quoting and splitting must come to the same words.
    words = shlex.split(out)
    assert words == out.split()
    echoed = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {out}"], capture_output=True, text=True, check=True
    )
    assert echoed.stdout.splitlines() == words
    options, additional = read(words)
    size = make_policy(meant["policy"]).page_size
    assert options == {"--block-size": str(size), "--attention-backend": "CUSTOM"}
    assert additional == {"longthink": meant}
    code, out, _ = call("vllm-args", "--decode-budget", 512, *arguments, "--json")
    assert code == 0
    assert json.loads(out) == {
        "block_size": size, "attention_backend": "CUSTOM", "additional_config": {"longthink": meant},
    }  # fmt: skip


def test_page_size_of_the_policy_is_the_block_size(call):
    _, out, _ = call("vllm-args", "--decode-budget", 512, "--policy", "raas:page_size=32")
    assert "--block-size 32 " in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--decode-budget"),
        (("--decode-budget", 0), "decode_budget=0 is out of range"),
        (("--decode-budget", 64, "--max-prompt-tokens", -1), "max_prompt_tokens=-1"),
        (("--decode-budget", 64, "--policy", "quest"), "'quest' keeps everything"),
        (("--decode-budget", 64, "--policy", "nonsense"), "nonsense"),
    ],
)
def test_what_vllm_would_refuse_is_refused_here(call, arguments, said):
    code, out, err = call("vllm-args", *arguments)
    assert (code, out) == (2, "")
    assert said in err
