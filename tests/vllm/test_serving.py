"""A real server with a bounded cache: pool sizes, responses and metrics."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest

from tests.vllm.server import (
    BOUNDED,
    BUDGET,
    LONGEST_PROMPT,
    PAGE,
    complete,
    metric_values,
    pool,
    refusal,
    serve,
)

pytestmark = pytest.mark.slow

LAYERS, KV_HEADS, HEAD_DIM, FLOAT = 2, 2, 32, 4
PAGE_BYTES = 2 * PAGE * LAYERS * KV_HEADS * HEAD_DIM * FLOAT


def pages(tokens):
    return -(-tokens // PAGE)


def test_dense_does_not_start_in_so_small_a_pool(qwen2, tmp_path):
    said = refusal(qwen2, tmp_path / "log", "--max-model-len", 4096, *pool(512, 32))
    assert "KV cache" in said
    assert "4096" in said


@pytest.fixture(scope="module")
def server(qwen2, tmp_path_factory):
    """A server with a pool for an eighth of the longest text."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(qwen2, log, "--max-model-len", 4096, *BOUNDED, *pool(512)) as up:
        yield up


def test_long_text_is_completed_in_constant_pages(server):
    cap, held = pages(40) + pages(BUDGET), []
    before = server.metrics()["longthink:evicted_pages_total"]
    with polled(lambda: held.append(server.metrics()["longthink:resident_pages"])):
        answer = complete(server.client(), 3000)
    assert answer.usage.completion_tokens == 3000
    assert max(held) == cap
    assert held.count(cap) > len(held) / 2
    after = server.metrics()
    assert after["longthink:evicted_pages_total"] - before == pages(40 + 3000 - 1) - cap
    assert after["vllm:num_preemptions_total"] == 0


@contextmanager
def polled(poll):
    """Call `poll` repeatedly while the block runs."""
    done = threading.Event()

    def run():
        while not done.wait(0.2):
            poll()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_too_long_a_prompt_is_refused_at_once(server):
    client = server.client()
    assert complete(client, 2, prompt=LONGEST_PROMPT).usage.completion_tokens == 2
    start = time.monotonic()
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, 2, prompt=LONGEST_PROMPT + 1)
    with pytest.raises(openai.BadRequestError, match="at most 128"):
        complete(client, 2, prompt=LONGEST_PROMPT + 1, stream=True)
    with pytest.raises(openai.BadRequestError, match="at most 128"):
        messages = [{"role": "user", "content": "a quick fox " * 60}]
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    assert time.monotonic() - start < 5
    assert "has 129 tokens" in str(refused.value)
    assert "max_prompt_tokens" in str(refused.value)
    assert complete(client, 2).usage.completion_tokens == 2


def test_a_request_may_have_a_budget_of_its_own(server):
    client, held, own = server.client(), [], {"vllm_xargs": {"longthink.decode_budget": 64}}
    with polled(lambda: held.append(server.metrics()["longthink:resident_pages"])):
        answer = complete(client, 1500, extra=own)
    assert max(held) == pages(40) + pages(64)
    whole = complete(client, 1500).choices[0].token_ids
    # The same until the request is full: its prompt takes 2.5 pages of 3.
    room = 48 + 64 - 40
    assert answer.choices[0].token_ids[:room] == whole[:room]
    assert answer.choices[0].token_ids != whole


def test_a_bad_budget_is_refused_at_once(server):
    client = server.client()
    outside, not_whole = "allowed is 1 to 256", "must be an integer"
    for value, message in ((0, outside), (257, outside), ("64", not_whole), ([64], not_whole)):
        extra = {"vllm_xargs": {"longthink.decode_budget": value}}
        with pytest.raises(openai.BadRequestError, match=message):
            complete(client, 2, extra=extra)
        with pytest.raises(openai.BadRequestError, match=message):
            messages = [{"role": "user", "content": "a quick fox"}]
            client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, extra_body=extra)
        # vLLM checks parameters once the stream is open: the error is its first event.
        with pytest.raises(openai.APIError, match=message):
            list(complete(client, 2, extra=extra, stream=True))
    with pytest.raises(openai.BadRequestError, match="no option 'buget'"):
        complete(client, 2, extra={"vllm_xargs": {"longthink.buget": 64}})
    assert complete(client, 2).usage.completion_tokens == 2


def test_metrics_count_what_was_bounded(server):
    """Exact numbers from lengths: nothing within the budget, every evicted page beyond it."""
    client, before = server.client(), server.metrics()
    # The prompt's last page has room for 8, and the last token is not stored.
    complete(client, BUDGET + 8 + 1)
    complete(client, BUDGET + 8 + 1 + 1)
    complete(client, 1000, prompt=100)
    after = server.metrics()
    evicted = 1 + pages(100 + 1000 - 1) - (pages(100) + pages(BUDGET))
    grown = {name: after[f"longthink:{name}"] - before[f"longthink:{name}"] for name in COUNTERS}
    assert grown == dict(zip(COUNTERS, (2, evicted, evicted * PAGE_BYTES), strict=True))
    assert after["longthink:pool_pages"] == 32
    assert after["longthink:resident_pages"] == 0


def test_engines_side_by_side_have_pools_of_their_own(server, qwen2, tmp_path):
    """Data parallelism: the texts of one engine, and metrics of each."""
    prompts, held = range(2), []
    alone = [complete(server.client(), 2000, seed=seed).choices[0].token_ids for seed in prompts]
    options = {"policy": "raas", "decode_budget": BUDGET, "max_prompt_tokens": LONGEST_PROMPT}
    bounded = ("--attention-backend", "CUSTOM", "--additional-config", json.dumps({"longthink": options}))
    arguments = ("--max-model-len", 4096, *bounded, *pool(1024), "--data-parallel-size", 2)
    with serve(qwen2, tmp_path / "log", *arguments, VLLM_ENABLE_V1_MULTIPROCESSING="1") as both:

        def numbers():
            lines = both.get("/metrics").splitlines()
            return [metric_values("\n".join(x for x in lines if f'engine="{i}"' in x)) for i in range(2)]

        with polled(lambda: held.append([x["longthink:resident_pages"] for x in numbers()])):
            with ThreadPoolExecutor(2) as callers:
                texts = list(callers.map(lambda seed: complete(both.client(), 2000, seed=seed), prompts))
        assert [text.choices[0].token_ids for text in texts] == alone
        after = numbers()
    assert [x["longthink:pool_pages"] for x in after] == [64, 64]
    assert [x["longthink:resident_pages"] for x in after] == [0, 0]
    assert [x["longthink:bounded_requests_total"] for x in after] == [1, 1]
    # A busy machine is not polled often, but each engine was polled at least once while it worked.
    assert all(0 < max(engine) <= pages(40) + pages(BUDGET) for engine in zip(*held, strict=True))


COUNTERS = ("bounded_requests_total", "evicted_pages_total", "saved_bytes_total")


@pytest.fixture(scope="module")
def dense(qwen2, tmp_path_factory):
    """Tokens and metrics of the same requests without the plugin, and with the plugin loaded but not enabled."""
    folder, found = tmp_path_factory.mktemp("dense"), {}
    for plugins in ("", "longthink"):
        arguments = ("--max-model-len", 2048, *pool(2560, 32), "--no-enable-prefix-caching")
        with serve(qwen2, folder / f"log-{plugins}", *arguments, VLLM_PLUGINS=plugins) as server:
            client = server.client()
            answers = [complete(client, 200, seed=i, logprobs=1) for i in range(3)]
            found[plugins] = ([a.choices[0] for a in answers], eight_at_once(server))
    return found


def test_plugin_changes_nothing_unless_enabled(dense):
    """Tokens and log probabilities are the same bit for bit, and so are the names of the metrics."""
    (without, metrics), (loaded, more) = dense[""], dense["longthink"]
    assert [choice.token_ids for choice in loaded] == [choice.token_ids for choice in without]
    logprobs = [[choice.logprobs.token_logprobs for choice in choices] for choices in (loaded, without)]
    assert logprobs[0] == logprobs[1]
    assert more.keys() == metrics.keys()


def test_dense_preempts_where_a_bounded_cache_does_not(dense, qwen2, tmp_path):
    assert dense["longthink"][1]["vllm:num_preemptions_total"] > 0
    with serve(qwen2, tmp_path / "log", "--max-model-len", 2048, *BOUNDED, *pool(2560)) as server:
        assert eight_at_once(server)["vllm:num_preemptions_total"] == 0


def eight_at_once(server):
    """Generate eight long texts concurrently; return the metrics."""
    client, before = server.client(), server.metrics()["vllm:generation_tokens_total"]
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda seed: complete(client, 450, seed=seed), range(8)))
    metrics = server.metrics()
    assert metrics["vllm:generation_tokens_total"] - before == 8 * 450
    return metrics
