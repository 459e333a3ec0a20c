"""Real vLLM servers in processes that never outlive the test."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai

KEY = "key-of-the-tests"
START_SECONDS = 280
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on a CPU: the worker lives in the engine's process, which starts faster
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
PAGE = 16
BUDGET = 256
LONGEST_PROMPT = 128
BOUNDED = (
    *("--attention-backend", "CUSTOM"),
    *("--additional-config.longthink.policy", "raas"),
    *("--additional-config.longthink.decode_budget", str(BUDGET)),
    *("--additional-config.longthink.max_prompt_tokens", str(LONGEST_PROMPT)),
)
"""Options that enable longthink."""
COMMON = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8", "--seed", "0")


def pool(tokens, page=PAGE):
    """A pool for that many tokens, plus the null block. vLLM's own backend on a CPU needs blocks of 32."""
    return ("--block-size", page, "--num-gpu-blocks-override", tokens // page + 1)


def complete(client, tokens, *, prompt=40, seed=0, extra=None, **options):
    """Request exactly `tokens` tokens after a prompt of exactly `prompt` tokens."""
    ids = [3 + (seed * 31 + i * 7) % 250 for i in range(prompt)]
    return client.completions.create(
        model="tiny",
        prompt=ids,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True} | (extra or {}),
        **options,
    )


@dataclass
class Server:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen

    def client(self, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=240, **options)

    def metrics(self):
        """Value of each metric by name and labels, without the labels of model and engine."""
        return metric_values(self.get("/metrics"))

    def get(self, path):
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()


def metric_values(text):
    """Values in Prometheus text format."""
    values = {}
    for line in text.splitlines():
        if line and line[0] != "#":
            name, _, value = line.rpartition(" ")
            labels = re.findall(r'(\w+)="([^"]*)"', name)
            rest = ",".join(f"{key}={of}" for key, of in labels if key not in ("model_name", "engine"))
            name = name.partition("{")[0]
            values[f"{name}{{{rest}}}" if rest else name] = float(value)
    return values


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def end_with_parent():
    """Have Linux terminate this process, and so its children, when the tests are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def launch(model, log, *arguments, **environment):
    """Start the server in a process group of its own."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", KEY, "--served-model-name", "tiny"]
    command += [*COMMON, *map(str, arguments)]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | environment,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    return process, f"http://127.0.0.1:{port}"


def stop(process):
    """Stop all processes of a server: SIGTERM, then SIGKILL."""
    for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and group_lives(process):
            time.sleep(0.1)
    process.wait(timeout=20)


def group_lives(process):
    """Whether any process of the group is left; reaps our own child."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def serve(model, log, *arguments, **environment):
    """A server that is up during the ``with`` block."""
    process, url = launch(model, log, *arguments, **environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{url}/health"):
            assert process.poll() is None, f"the server exited:\n{tail(log)}"
            assert time.monotonic() < deadline, f"the server does not come up:\n{tail(log)}"
            time.sleep(0.2)
        yield Server(url, log, process)
    finally:
        stop(process)


def refusal(model, log, *arguments, **environment):
    """Log of a server that must fail to start."""
    process, url = launch(model, log, *arguments, **environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None:
            assert not answers(f"{url}/health"), "the server started"
            assert time.monotonic() < deadline, f"the server neither starts nor exits:\n{tail(log)}"
            time.sleep(0.2)
        assert process.returncode != 0
    finally:
        stop(process)
    return Path(log).read_text()


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def tail(log, lines=40):
    return "\n".join(Path(log).read_text().splitlines()[-lines:])
