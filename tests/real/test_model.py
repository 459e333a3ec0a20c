"""A pretrained model from Python: the text of dense where nothing is evicted, bounded and readable where much is."""

import time
from copy import deepcopy

import pytest
import torch

import longthink
from longthink.hf import self_check
from tests.grids import by_day
from tests.real import reading
from tests.real.conftest import LENGTH

pytestmark = pytest.mark.slow
GREEDY = dict(do_sample=False, return_dict_in_generate=True)
TURN = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
NEXT = "Which of these steps takes the longest, and why?"
FACTS = {
    "What is the capital of France?": "Paris",
    "What is the chemical symbol of gold?": "Au",
    "Which planet is the largest in the solar system?": "Jupiter",
    "Who wrote Romeo and Juliet?": "Shakespeare",
}
"""Questions that the model answers right when nothing was said before."""
BYTES_PER_TOKEN = 30 * 3 * 64 * 2 * 4
"""Layers, KV heads, head dimension, key and value, float32."""


def check_bound(cache, prompt):
    """Nothing is held beyond the bound, and what is held is real and includes the prompt."""
    assert cache.num_evicted > 0
    assert cache.kv_bytes == cache.bound_tokens * BYTES_PER_TOKEN < cache.dense_kv_bytes
    for layer in range(30):
        for positions in cache.resident_positions(layer)[0]:
            assert len({*positions}) == len(positions) <= cache.bound_tokens
            assert {*range(prompt)} <= {*positions}
            assert max(positions) == cache.get_seq_length() - 1


@pytest.mark.parametrize(
    "policy",
    by_day(["raas", "h2o:pin_prompt=True"], ["milestone", "raas", "h2o:pin_prompt=True", "streaming_llm"]),
)
def test_with_room_for_all_it_writes_what_transformers_writes(model, ids, dense, policy):
    out = longthink.generate(model, ids, policy=policy, budget=128, max_new_tokens=32, **GREEDY)
    assert torch.equal(out.sequences, dense[:, : ids.shape[1] + 32])
    assert out.past_key_values.num_evicted == 0


@pytest.mark.parametrize("policy", by_day(["raas:page_size=4"], ["milestone", "raas:page_size=4"]))
def test_with_little_room_it_is_bounded_and_readable(model, ids, tokenizer, policy):
    prompt = ids.shape[1]
    out = longthink.generate(model, ids, policy=policy, decode_budget=32, max_new_tokens=LENGTH, **GREEDY)
    cache = out.past_key_values
    assert cache.bound_tokens <= prompt + 32 + 16
    check_bound(cache, prompt)
    assert reading.faults(tokenizer.decode(out.sequences[0, prompt:])) == []


def converse(model, ids, tokenizer, length, **budget):
    """Two turns on one cache: texts of 1 x N after each answer, bounds after each, and the cache."""
    asked = tokenizer(TURN.format(NEXT), add_special_tokens=False, return_tensors="pt").input_ids
    texts, bounds = [], []
    with longthink.make_cache(model, policy="raas", **budget) as cache:
        for text in (ids, None):
            text = torch.cat([texts[-1], asked], 1) if text is None else text
            options = dict(past_key_values=cache, max_new_tokens=length, min_new_tokens=length)
            texts.append(longthink.generate(model, text, do_sample=False, **options))
            bounds.append(cache.bound_tokens)
        return texts, bounds, cache, asked.shape[1]


def test_a_second_turn_continues_as_transformers_would(model, ids, dense, tokenizer):
    (first, second), _, cache, _ = converse(model, ids, tokenizer, 16, decode_budget=256)
    assert torch.equal(first, dense[:, : first.shape[1]])
    expected = model.generate(second[:, :-16], max_new_tokens=16, min_new_tokens=16, do_sample=False)
    assert torch.equal(second, expected)
    assert cache.num_evicted == 0


def test_two_turns_stay_bounded_and_readable(model, ids, tokenizer):
    (first, second), bounds, cache, asked = converse(model, ids, tokenizer, 40, decode_budget=16)
    check_bound(cache, ids.shape[1])
    # The bound grows by the question, in whole pages, and not by the answers.
    assert 0 < bounds[1] - bounds[0] <= asked + 16
    question = range(first.shape[1], first.shape[1] + asked)
    assert all({*question} <= {*positions} for positions in cache.resident_positions(0)[0])
    for text in (first[0, ids.shape[1] :], second[0, first.shape[1] + asked :]):
        assert reading.faults(tokenizer.decode(text, skip_special_tokens=True)) == []


@pytest.mark.parametrize("policy", by_day(["recall"], ["recall", "raas"]))
def test_a_second_question_is_answered_as_well_as_alone(model, ids, tokenizer, policy):
    def ask(text, asked, **options):
        text = torch.cat([text, asked], 1)
        out = longthink.generate(model, text, max_new_tokens=20, do_sample=False, **options)
        return tokenizer.decode(out[0, text.shape[1] :])

    with longthink.make_cache(model, policy=policy, decode_budget=32) as cache:
        first = longthink.generate(model, ids, past_key_values=cache, max_new_tokens=48, do_sample=False)
        assert cache.num_evicted > 0
        for question, answer in by_day([*FACTS.items()][::2], FACTS.items()):
            asked = tokenizer(TURN.format(question), add_special_tokens=False, return_tensors="pt").input_ids
            # The turn begins with the end of the answer before it.
            alone = asked[:, 2:]
            assert answer in ask(ids[:, :0], alone, policy="dense")
            assert answer in ask(first, asked, past_key_values=deepcopy(cache))


def test_the_engine_serves_several_at_once(model, ids, dense, tokenizer):
    other = tokenizer("The capital of France is", return_tensors="pt").input_ids
    alone = model.generate(other, max_new_tokens=8, do_sample=False)
    with longthink.Engine(model, policy="raas", decode_budget=64, seats=2, compile=False) as engine:
        handles = [
            engine.submit(prompt, max_new_tokens=new) for prompt, new in ((ids, 24), (other, 8), (ids, 24))
        ]
        answers = [list(handle.result().tokens) for handle in handles]
    expected = dense[0, ids.shape[1] :][:24].tolist()
    assert answers == [expected, alone[0, other.shape[1] :].tolist(), expected]


def test_the_self_check_passes_and_is_quick(model, monkeypatch):
    """0.3 s of one core by default, and 1.3 s with the batch that it leaves out on a machine that is slow."""
    for limit in (self_check._SECONDS, 600.0):
        monkeypatch.setattr(self_check, "_passed", {})
        monkeypatch.setattr(self_check, "_SECONDS", limit)
        start = time.process_time()
        longthink.make_cache(model, budget=64).close()
        seconds = time.process_time() - start
        assert len(self_check._passed) == 1
        assert seconds < 5.0, f"the self-check took {seconds:.1f} s"


def test_reading_sees_what_is_not_english(tokenizer, dense, ids):
    noise = torch.randint(len(tokenizer), (80,), generator=torch.Generator().manual_seed(0))
    assert reading.faults(tokenizer.decode(noise))
    words = tokenizer.decode(dense[0, ids.shape[1] :])
    assert reading.faults(words) == []
    assert reading.faults(" ".join(words.split()[:4] * 12))
    assert reading.faults(words + " dough dough dough")
    assert reading.faults(words[:40])
