"""Many requests, most of them aborted or invalid: no page and no memory leaks."""

import json
import os
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest

from tests.vllm.server import BOUNDED, KEY, LONGEST_PROMPT, complete, pool, serve

pytestmark = pytest.mark.slow

REQUESTS = int(os.environ.get("LONGTHINK_VLLM_SOAK", "160"))
"""2000 for the long one."""
CALLERS = 8
ROUNDS = 4
GROWTH = 4e6
"""Bytes that all processes may grow by after the first two rounds, which include every kind of request."""
# oneDNN caches a primitive for each number of tokens in a step, up to 1,024: 130 MB in 2,500 requests.
SMALL_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}


def whole(client, rng):
    tokens = rng.choice([1, 5, 60, 400])
    answer = complete(client, tokens, prompt=rng.randint(1, LONGEST_PROMPT), seed=rng.randint(0, 5))
    assert answer.usage.completion_tokens == tokens
    assert len(answer.choices[0].token_ids) == tokens


def several(client, rng):
    messages = [{"role": "user", "content": "the quick fox " * rng.randint(1, 5)}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, n=3, max_tokens=20, temperature=1.0, extra_body={"ignore_eos": True}
    )
    assert len(answer.choices) == 3


def cancelled(client, rng):
    """The client closes the stream early, sometimes long after the budget is used up."""
    stop = rng.choice([1, 20, 300])
    with complete(client, 1500, prompt=rng.randint(1, 60), seed=rng.randint(0, 5), stream=True) as stream:
        for seen, _ in enumerate(stream):
            if seen >= stop:
                break


def disconnected(client, rng):
    """The connection is dropped in the middle of an answer, or before it begins."""
    body = json.dumps({"model": "tiny", "prompt": list(range(3, 40)), "max_tokens": 1500, "ignore_eos": True})
    lines = (
        "POST /v1/completions HTTP/1.1",
        f"Host: {client.base_url.host}",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as connection:
        connection.sendall("\r\n".join([*lines, "", body]).encode())
        time.sleep(rng.choice([0, 0.05, 0.5]))


def too_long(client, rng):
    with pytest.raises(openai.BadRequestError, match="at most"):
        complete(client, 5, prompt=LONGEST_PROMPT + rng.randint(1, 200))


def invalid(client, rng):
    with pytest.raises(openai.BadRequestError):
        complete(client, -rng.randint(1, 9))


KINDS = [whole, cancelled, disconnected] * 3 + [whole, several, too_long, whole, cancelled, invalid]


def memory(server):
    """Resident bytes of each process of a server."""
    top = psutil.Process(server.process.pid)
    return [process.memory_info().rss for process in [top, *top.children(recursive=True)]]


def wait_until_idle(server):
    deadline = time.monotonic() + 120
    while True:
        metrics = server.metrics()
        if metrics["vllm:num_requests_running"] == metrics["vllm:num_requests_waiting"] == 0:
            return metrics
        assert time.monotonic() < deadline, "aborted requests go on"
        time.sleep(0.2)


def test_soak(qwen2, tmp_path):
    options = ("--max-model-len", 4096, *BOUNDED, *pool(2048))
    with serve(qwen2, tmp_path / "log", *options, **SMALL_CACHE) as server:
        client = server.client()
        alone = complete(client, 600, seed=9).choices[0].token_ids

        def one(number):
            kind = KINDS[number % len(KINDS)]
            kind(client, random.Random(number))
            return kind

        grown = []
        for part in range(ROUNDS):
            numbers = range(REQUESTS * part // ROUNDS, REQUESTS * (part + 1) // ROUNDS)
            with ThreadPoolExecutor(CALLERS) as callers:
                kinds = Counter(kind.__name__ for kind in callers.map(one, numbers))
            assert len(kinds) == len(set(KINDS))
            idle = wait_until_idle(server)
            assert idle["vllm:kv_cache_usage_perc"] == 0
            assert idle["longthink:resident_pages"] == 0
            grown.append(memory(server))
            sizes = " + ".join(f"{size / 1e6:.1f}" for size in grown[-1])
            evicted = int(idle["longthink:evicted_pages_total"])
            print(f"{numbers.stop} requests, {dict(kinds)}: {evicted} pages evicted, {sizes} MB", flush=True)
        assert len({len(sizes) for sizes in grown}) == 1  # no process has come or gone
        assert sum(grown[-1]) - sum(grown[1]) < GROWTH
        assert complete(client, 600, seed=9).choices[0].token_ids == alone
        assert idle["longthink:evicted_pages_total"] > 0
