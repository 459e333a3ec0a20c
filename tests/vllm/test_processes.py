"""Engines in several processes: tensor and pipeline parallelism, Ray workers, and a compiled model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.engines import SETTINGS, random_prompts, save_random_model
from tests.vllm.server import end_with_parent, stop

pytestmark = pytest.mark.slow
RAY_DEVICE = Path(__file__).parent / "ray_device"
SCRIPT = """
import json, sys
if __name__ == "__main__":
    arguments, prompts = json.loads(sys.argv[1])
    if arguments.get("distributed_executor_backend") == "ray":
        import ray
        ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    from vllm import LLM, SamplingParams
    llm = LLM(**arguments)
    sampling = SamplingParams(temperature=0, max_tokens=260, ignore_eos=True, detokenize=False)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in done]))
    llm.llm_engine.engine_core.shutdown()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    model = save_random_model(folder / "model")
    script = folder / "serve.py"
    script.write_text(SCRIPT)
    prompts = random_prompts(21, 50)

    def served(policy="raas:sharing=layer", *, tp_sync=False, **more):
        options = {"policy": policy, "decode_budget": 128, "tp_sync": tp_sync}
        arguments = dict(
            model=str(model),
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=4,
            enforce_eager=True,
            block_size=16,
            kv_cache_memory_bytes=32 << 20,
            attention_backend="CUSTOM",
            additional_config={"longthink": options},
        )
        environment = os.environ | SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
        if more.get("distributed_executor_backend") == "ray":
            path = os.pathsep.join([str(RAY_DEVICE), os.environ.get("PYTHONPATH", "")])
            # The Ray cluster belongs to this process, so the engine must run in it.
            environment |= {"PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        command = [sys.executable, str(script), json.dumps([arguments | more, prompts])]
        # Log to a file: a worker that outlives its engine would keep a pipe open and hang the test.
        with open(folder / "log", "w+") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
            try:
                process.wait(timeout=600)
            finally:
                stop(process)
            log.seek(0)
            text = log.read()
        lines = [line for line in text.splitlines() if line.startswith("TOKENS")]
        assert lines, text[-3000:]
        return json.loads(lines[0].removeprefix("TOKENS"))

    return served


@pytest.fixture(scope="module")
def alone(run):
    return run()


def test_synchronised_ranks_give_the_tokens_of_one(run, alone):
    assert run(tensor_parallel_size=2, tp_sync=True) == alone
    # Without synchronisation each rank evicts by its own heads, and texts differ.
    assert run(tensor_parallel_size=2) != alone


def test_compiled(run, alone):
    assert run(enforce_eager=False) == alone


def test_stages_of_a_pipeline_give_the_tokens_of_one(run, alone):
    # Compiled: on a CPU, vLLM allocates the tensors that stages exchange only when it warms up the compiled model.
    assert run(pipeline_parallel_size=2, enforce_eager=False) == alone


@pytest.mark.parametrize("version", ["0", "1"])
def test_ray_workers_give_the_same_tokens(run, alone, version, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", version)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    assert run(distributed_executor_backend="ray", tensor_parallel_size=2, tp_sync=True) == alone
