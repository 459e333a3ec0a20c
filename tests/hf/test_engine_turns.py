"""Conversations in the engine, and requests that do not wait for a long step."""

import threading
import time

import pytest
import torch

import longthink
from longthink.hf.step import DecodeStep
from tests.hf.test_engine import ids, small

LIMIT = 12
QUESTION = (7, 8, 9, 10, 11)


def engine(**options):
    return longthink.Engine(
        small(), **dict(policy="raas", decode_budget=32, seats=3, compile=False) | options
    )


def conversation(first, question, **budget):
    """Answers to two turns, by `longthink.generate` on one cache."""
    model = small()
    with longthink.make_cache(model, policy="raas", **budget) as cache:
        text = torch.tensor([first])
        answers = []
        for turn in ((), question):
            text = torch.cat([text, torch.tensor([turn], dtype=torch.int64)], 1)
            out = longthink.generate(
                model, text, past_key_values=cache, max_new_tokens=LIMIT, do_sample=False, compile=False
            )
            answers.append(tuple(out[0, text.shape[1] :].tolist()))
            text = out
        return answers


def test_a_conversation_goes_on_with_the_tokens_of_generate():
    expected = conversation(ids(3), QUESTION, decode_budget=32)
    with engine() as running:
        first = running.submit(ids(3), max_new_tokens=LIMIT, keep_cache=True).result()
        assert first.cache is not None and first.cache.get_seq_length() == len(ids(3)) + len(first.tokens) - 1
        # Beside others, and twice from the same result, which stays as it is.
        handles = [running.submit(QUESTION, max_new_tokens=LIMIT, after=first) for _ in range(2)]
        other = running.submit(ids(4), max_new_tokens=LIMIT)
        answers = [handle.result() for handle in handles]
        assert other.result().cache is None
    assert [first.tokens, *(answer.tokens for answer in answers)] == [*expected, expected[1]]
    assert small().config._attn_implementation == "sdpa"
    # The result outlives its engine, and is a cache like any other.
    with engine() as running:
        third = running.submit(QUESTION, max_new_tokens=LIMIT, after=first).result()
    assert third.tokens == expected[1]


def test_the_question_is_protected_and_the_bound_grows_by_it():
    with engine(decode_budget=16) as running:
        first = running.submit(ids(2), max_new_tokens=40, keep_cache=True).result()
        second = running.submit(QUESTION * 7, max_new_tokens=60, after=first, keep_cache=True).result()
    start = len(ids(2)) + len(first.tokens)
    held = second.cache.resident_positions(0)[0][0]
    assert set(range(start, start + 35)) <= set(held)
    assert set(range(len(ids(2)))) <= set(held)
    pages = second.cache.bound_tokens // 16 - 1
    assert pages * 16 >= len(ids(2)) + 35
    assert len(held) <= second.cache.bound_tokens < start + 35 + len(second.tokens)


def test_a_turn_that_does_not_fit_is_a_result_and_harms_nobody():
    with engine(decode_budget=None, budget=64) as running:
        first = running.submit(ids(2), max_new_tokens=LIMIT, keep_cache=True).result()
        no_room = running.submit(range(3, 80), max_new_tokens=LIMIT, after=first).result()
        fits = running.submit(QUESTION, max_new_tokens=LIMIT, after=first).result()
    assert no_room.finish == "no_room" and "budget=64" in no_room.note
    assert fits.tokens == conversation(ids(2), QUESTION, budget=64)[1]


def test_only_the_result_of_a_request_that_kept_its_cache_can_be_continued():
    with engine() as running:
        first = running.submit(ids(2), max_new_tokens=2).result()
        for wrong in (first, "first", 3):
            with pytest.raises(ValueError, match=r"after=.* keep_cache=True"):
                running.submit(QUESTION, max_new_tokens=2, after=wrong)


@pytest.fixture
def stuck_step(monkeypatch):
    """The first decode step takes until the event is set, as one that compiles does."""
    entered, release, step = threading.Event(), threading.Event(), DecodeStep.__call__

    def slow(self, token_B1):
        entered.set()
        assert release.wait(60)
        return step(self, token_B1)

    monkeypatch.setattr(DecodeStep, "__call__", slow)
    yield entered, release
    release.set()


def test_cancelling_does_not_wait_for_a_step_that_compiles(stuck_step):
    entered, release = stuck_step
    with engine() as running:
        kept = running.submit(ids(1), max_new_tokens=LIMIT)
        # A cache in the middle of a step is none that could be continued.
        keeps = dict(max_new_tokens=LIMIT, keep_cache=True)
        gone = [running.submit(ids(number), **keeps) for number in (2, 3, 4)]
        assert entered.wait(60)
        started = time.monotonic()
        for handle in gone:
            handle.cancel()
        assert time.monotonic() - started < 0.2
        results = [handle.result(timeout=2) for handle in gone]
        assert time.monotonic() - started < 1
        assert [(result.finish, result.cache) for result in results] == [("cancelled", None)] * 3
        assert list(gone[0]) == list(results[0].tokens)
        release.set()
        assert kept.result(timeout=60).tokens == conversation(ids(1), (), decode_budget=32)[0]
        # What was cancelled takes no part any more, and its seats are free.
        assert running.submit(ids(5), max_new_tokens=LIMIT).result(timeout=60).finish == "length"
        assert [handle.result().tokens for handle in gone] == [result.tokens for result in results]
