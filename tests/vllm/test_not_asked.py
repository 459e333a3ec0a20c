"""Which objects live in a vLLM that has the plugin, asked for and not; everything in one process."""

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


def live(model, **options):
    """Classes of longthink that have instances after a generation, and the tokens."""
    done = subprocess.run(
        [sys.executable, "-c", LIVE, str(model), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[2],
        env=os.environ | ENVIRONMENT,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("LIVE ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("LIVE "))


def test_no_object_of_longthink_lives_unless_it_is_asked_for(qwen2):
    ours, tokens = live(qwen2)
    assert ours == []
    options = {"policy": "raas", "decode_budget": 256}
    asked, bounded = live(
        qwen2, block_size=16, attention_backend="CUSTOM", additional_config={"longthink": options}
    )
    assert asked != []
    assert bounded == tokens  # within the budget
