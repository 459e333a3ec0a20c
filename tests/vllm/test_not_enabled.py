"""Objects of longthink that are alive in a vLLM with the plugin, enabled or not; everything in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.server import ENVIRONMENT

pytestmark = pytest.mark.slow

LIVE = """
import gc, json, sys
from vllm import LLM, SamplingParams

model, options = sys.argv[1:]
llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=1024, seed=0, **json.loads(options))
sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
(answer,) = llm.generate([{"prompt_token_ids": list(range(5, 45))}], sampling, use_tqdm=False)
kinds = {type(thing) for thing in gc.get_objects()}
ours = sorted({kind.__name__ for kind in kinds if kind.__module__.startswith("longthink")})
print("LIVE", json.dumps([ours, list(answer.outputs[0].token_ids)]))
"""


STATISTICS = """
import json, sys
from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

model, options = sys.argv[1:]
arguments = dict(dtype="float32", enforce_eager=True, max_model_len=1024, disable_log_stats=True)
llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model, **arguments, **json.loads(options)))
print("LIVE", json.dumps([llm.log_stats, llm.logger_manager is None]))
llm.shutdown()
"""
ENABLED = dict(
    block_size=16,
    attention_backend="CUSTOM",
    additional_config={"longthink": {"policy": "raas", "decode_budget": 256}},
)


def run(script, model, options):
    """Output of a script that runs vLLM with these options."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(model), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[2],
        env=os.environ | ENVIRONMENT,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("LIVE ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("LIVE "))


def test_no_object_of_longthink_is_alive_unless_enabled(qwen2):
    ours, tokens = run(LIVE, qwen2, {})
    assert ours == []
    enabled, bounded = run(LIVE, qwen2, ENABLED)
    assert enabled != []
    assert bounded == tokens  # within the budget


def test_disabled_statistics_stay_disabled(qwen2):
    assert run(STATISTICS, qwen2, {}) == [False, True]
