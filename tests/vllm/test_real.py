"""A pretrained model, SmolLM2-135M-Instruct, behind a real server: texts of Hugging Face, whatever else is going on.

LONGTHINK_MODELS names the folder that has `smollm2-135m`; without it these tests skip.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import longthink
from tests.vllm.server import pool, serve

pytestmark = pytest.mark.slow

NAME, POLICY, SERVER, OWN = "smollm2-135m", "recall:page_size=16", 256, 48
QUESTIONS = ("Tell me how bread is made, step by step.", "And how long does it keep?")
SHORT, LONG = 40, 112  # new tokens; the longer text evicts pages from a budget of OWN


@pytest.fixture(scope="module")
def folder():
    path = Path(os.environ.get("LONGTHINK_MODELS", ""), NAME)
    if "LONGTHINK_MODELS" not in os.environ or not (path / "config.json").is_file():
        pytest.skip(f"LONGTHINK_MODELS names no folder with {NAME}")
    return path


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("real") / "log"
    options = {"policy": POLICY, "decode_budget": SERVER, "max_prompt_tokens": 256}
    bounded = [f"--additional-config.longthink.{name}={value}" for name, value in options.items()]
    arguments = ("--attention-backend", "CUSTOM", *bounded, "--max-model-len", 1024, *pool(8192))
    with serve(folder, log, *arguments) as server:
        yield server.client(), server


@pytest.fixture(scope="module")
def on_hugging_face(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(messages, count, decode_budget=None):
        """Greedy tokens of a conversation; dense without a budget."""
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        cache = dict(policy="dense")
        if decode_budget is not None:
            cache = dict(policy=POLICY, decode_budget=decode_budget, compile=False)
        whole = longthink.generate(model, ids, max_new_tokens=count, do_sample=False, **cache)
        return whole[0, ids.shape[1] :].tolist()

    return answer


def ask(client, messages, count, own=None, **options):
    extra = {"return_token_ids": True} | ({"vllm_xargs": {"longthink.decode_budget": own}} if own else {})
    return client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=count, temperature=0, extra_body=extra, **options
    )


def test_two_turns_have_the_tokens_of_hugging_face(client, on_hugging_face):
    client, messages = client[0], []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        choice = ask(client, messages, SHORT).choices[0]
        assert choice.token_ids == on_hugging_face(messages, SHORT)
        messages.append({"role": "assistant", "content": choice.message.content})


def test_evictions_are_those_of_hugging_face(client, on_hugging_face):
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    tokens = ask(client[0], messages, LONG, own=OWN).choices[0].token_ids
    assert tokens == on_hugging_face(messages, LONG, OWN)
    assert tokens != ask(client[0], messages, LONG).choices[0].token_ids


def test_nothing_is_left_of_many_requests_of_all_kinds(client):
    client, server = client
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    alone = ask(client, messages, SHORT).choices[0].token_ids

    def send(number):
        kind = number % 5
        if kind == 0:  # cancelled while streaming
            with ask(client, messages, LONG, stream=True) as stream:
                for _, _ in zip(range(number % 4 + 1), stream, strict=False):
                    pass
        elif kind == 1:
            with pytest.raises(openai.BadRequestError):
                ask(client, messages, SHORT, own=SERVER + number)
        elif kind == 2:
            with pytest.raises(openai.BadRequestError):
                ask(client, [{"role": "user", "content": "bread " * 400}], SHORT)
        elif kind == 3:
            assert len(ask(client, messages, LONG, own=OWN).choices[0].token_ids) == LONG
        else:
            assert ask(client, messages, SHORT).choices[0].token_ids == alone

    with ThreadPoolExecutor(6) as callers:
        list(callers.map(send, range(40)))
    assert ask(client, messages, SHORT).choices[0].token_ids == alone
    assert server.metrics()["longthink:resident_pages"] == 0
