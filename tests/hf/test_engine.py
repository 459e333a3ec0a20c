"""`Engine` under many threads, cancellation, faults and closing: every handle ends, with the tokens it gets alone."""

import gc
import random
import threading
import time
from functools import cache

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import longthink
from longthink.hf import Request
from longthink.hf.batch import Batch
from longthink.hf.request import Job
from longthink.hf.scheduler import Scheduler
from longthink.policies import needs_budget
from tests.hf.test_memory import live_bytes
from tests.models import build, prompt

POLICIES = longthink.available_policies()
LIMIT = 24
PATIENCE = 120


@cache
def small():
    return build("qwen2", num_hidden_layers=1)


@cache
def ids(number):
    return tuple(prompt((1 + 7 * number % 23,), seed=number)[0][0].tolist())


@cache
def alone(number, policy="raas"):
    """Tokens of a prompt by `longthink.generate`."""
    kept = {"decode_budget": 16} if needs_budget(longthink.make_policy(policy)) else {}
    out = longthink.generate(
        small(), torch.tensor([ids(number)]), policy=policy, max_new_tokens=LIMIT, do_sample=False, **kept
    )
    return tuple(out[0, len(ids(number)) :].tolist())


def engine(policy="raas", **options):
    kept = {"decode_budget": 16} if needs_budget(longthink.make_policy(policy)) else {}
    return longthink.Engine(small(), **dict(policy=policy, seats=3) | kept | options)


def failing(at, error, *, columns=None):
    """Hook on the model that raises in the engine's n-th call (with so many columns)."""
    calls = []

    def hook(module, args, kwargs):
        # `generate` gives its tokens by name.
        if args and (columns is None or args[0].shape[1] == columns):
            calls.append(1)
            if len(calls) == at:
                raise error

    return small().register_forward_pre_hook(hook, with_kwargs=True)


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    if small().config._attn_implementation != "sdpa":
        gc.collect()
    assert small().config._attn_implementation == "sdpa"
    assert not [t for t in threading.enumerate() if t.name == "longthink-engine"]


def test_tokens_come_one_by_one_and_the_result_says_what_became_of_them():
    with engine() as running:
        handle = running.submit(ids(1), max_new_tokens=LIMIT, tag="mine")
        assert tuple(handle) == tuple(handle) == alone(1)
        done = handle.result()
        assert (done.tokens, done.finish, done.request.tag) == (alone(1), "length", "mine")
        assert handle.done
        handle.cancel()
        assert handle.result() is done
        again = running.submit(torch.tensor([ids(1)]), max_new_tokens=5)
        assert again.result(PATIENCE).tokens == alone(1)[:5]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_many_threads_submit_stream_and_cancel(seed):
    wrong, cancelled = [], []

    def caller(number):
        rng = random.Random(100 * seed + number)
        for _ in range(5):
            which, limit = rng.randrange(6), rng.randint(1, LIMIT)
            handle = running.submit(ids(which), max_new_tokens=limit)
            stop = rng.choice([None, None, 0, rng.randint(1, LIMIT)])
            if stop == 0:
                handle.cancel()
            seen = []
            for token in handle:
                seen.append(token)
                if len(seen) == stop:
                    handle.cancel()
            done = handle.result(PATIENCE)
            cancelled.append(done.finish == "cancelled")
            whole = alone(which)[:limit]
            if tuple(seen) != done.tokens or done.tokens != whole[: len(seen)]:
                wrong.append((number, which, seen, whole))
            if (done.finish == "length" and len(seen) != limit) or (
                done.finish == "cancelled" and stop is None
            ):
                wrong.append((number, done))

    for which in range(6):
        alone(which)
    with engine() as running:
        threads = [threading.Thread(target=caller, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    assert not wrong
    assert len(cancelled) == 40
    assert 0 < sum(cancelled) < 30


class Schedule(RuleBasedStateMachine):
    """Any order of submitting, cancelling and stepping; tokens are prefixes of what `generate` gives."""

    def __init__(self):
        super().__init__()
        self.spare = longthink.make_cache(small(), policy=self.policy, decode_budget=16)
        self.batch = Batch(small(), self.spare, 3, compile=self.compile)
        self.scheduler = Scheduler(self.batch)
        self.jobs = []

    @rule(which=st.integers(0, 5), limit=st.integers(1, LIMIT))
    def submit(self, which, limit):
        job = Job(Request(key="0", tokens=ids(which), max_new_tokens=limit, tag=which))
        self.scheduler.add(job, in_thread=False)
        self.jobs.append((job, alone(which, self.policy)[:limit]))

    @rule(data=st.data())
    def cancel(self, data):
        if self.jobs:
            job, _ = data.draw(st.sampled_from(self.jobs))
            before = job.finished
            self.scheduler.cancel(job)
            self.scheduler.drop_cancelled()
            assert job.finished.finish == "cancelled" if before is None else job.finished is before

    @rule(steps=st.integers(1, 9))
    def step(self, steps):
        for _ in range(steps):
            self.scheduler.step()

    @invariant()
    def tokens_are_those_of_generate(self):
        for job, whole in self.jobs:
            assert tuple(job.tokens) == whole[: len(job.tokens)]
            assert not job.done or job.finished.tokens == tuple(job.tokens)
            assert job.done or len(job.tokens) < len(whole)
        waiting = sum(not job.done for job, _ in self.jobs)
        assert self.batch.occupied <= min(3, waiting)
        if not self.batch.occupied and not self.compile:
            assert self.batch._cache is None

    def teardown(self):
        while not all(job.done for job, _ in self.jobs):
            self.scheduler.step()
        self.tokens_are_those_of_generate()
        for job, whole in self.jobs:
            assert job.finished.finish == "cancelled" or job.finished.tokens == whole
        self.scheduler.close()
        self.spare.close()


def schedule(policy, compile):
    machine = type("Schedule", (Schedule,), {"policy": policy, "compile": compile})
    case = machine.TestCase
    case.settings = settings(max_examples=6, stateful_step_count=12, deadline=None)
    return case


TestScheduleShrinking = schedule("raas", False)
TestScheduleCompiled = pytest.mark.slow(
    pytest.mark.usefixtures("light_compiler")(schedule("streaming_llm", True))
)


def test_prompts_may_be_read_in_pieces():
    columns = []
    hook = small().register_forward_pre_hook(
        lambda module, args, kwargs: columns.extend(ids.shape[1] for ids in args), with_kwargs=True
    )
    with engine(prefill_chunk_size=4) as running:
        handles = [running.submit(ids(i), max_new_tokens=LIMIT) for i in range(5)]
        assert [handle.result(PATIENCE).tokens for handle in handles] == [alone(i) for i in range(5)]
    hook.remove()
    assert max(columns) == 4


@pytest.mark.parametrize("policy", ["h2o", "streaming_llm"])
def test_what_is_kept_of_a_prompt_in_pieces_is_chosen_from_all_of_it(policy):
    kept = {"policy": policy, "budget": 32}
    long = prompt((90,), seed=3)[0]
    wanted = longthink.generate(small(), long, max_new_tokens=LIMIT, do_sample=False, **kept)[0, 90:].tolist()
    with longthink.Engine(small(), seats=2, prefill_chunk_size=16, **kept) as running:
        handle = running.submit(long[0].tolist(), max_new_tokens=LIMIT)
        assert list(handle.result(PATIENCE).tokens) == wanted


def test_each_request_has_its_own_sampling_and_randomness():
    warm = longthink.Sampling(temperature=1.0, top_k=20)
    with engine() as running:
        options = [dict(), dict(sampling=warm, key="a"), dict(sampling=warm, key="b"), dict(sampling=warm)]
        handles = [running.submit(ids(2), max_new_tokens=LIMIT, **more) for more in options * 2]
        tokens = [handle.result(PATIENCE).tokens for handle in handles]
    assert tokens[0] == tokens[4] == alone(2)
    assert tokens[1] == tokens[5] and tokens[2] == tokens[6]
    # Without a key it is the number of the request that counts.
    assert len(set(tokens)) == 5


def test_an_error_in_a_step_ends_those_in_it_and_nobody_else():
    with engine(seats=2) as running:
        # Late, because the first may take some steps before the second is there.
        hook = failing(LIMIT - 4, ValueError("boom"), columns=1)
        handles = [running.submit(ids(i), max_new_tokens=LIMIT) for i in (2, 3, 4, 5)]
        for handle in handles[:2]:
            seen = []
            with pytest.raises(longthink.EngineError, match="ValueError: boom") as caught:
                for token in handle:
                    seen.append(token)
            assert isinstance(caught.value.__cause__, ValueError)
            assert 0 < len(seen) < LIMIT
            with pytest.raises(longthink.EngineError, match="boom"):
                handle.result(PATIENCE)
        assert [tuple(handle) for handle in handles[2:]] == [alone(4), alone(5)]
        hook.remove()


def test_an_error_while_a_prompt_is_read_is_its_own():
    with engine() as running:
        hook = failing(1, RuntimeError("no"), columns=len(ids(2)))
        handles = [running.submit(ids(i), max_new_tokens=LIMIT) for i in (1, 2, 3)]
        with pytest.raises(longthink.EngineError, match="no"):
            handles[1].result(PATIENCE)
        assert [handles[i].result(PATIENCE).tokens for i in (0, 2)] == [alone(1), alone(3)]
        hook.remove()


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_map_raises_what_the_model_raised_and_the_engine_goes_on(error):
    asked = [Request(key="0", tokens=ids(i), max_new_tokens=LIMIT) for i in range(5)]
    with engine() as running:
        hook = failing(9, error)
        with pytest.raises(type(error)):
            list(running.map(asked))
        hook.remove()
        assert running._scheduler._batch._cache is None
        assert sorted(done.tokens for done in running.map(asked)) == sorted(alone(i) for i in range(5))


def test_map_and_submit_share_the_seats():
    asked = [Request(key="0", tokens=ids(i), max_new_tokens=LIMIT, tag=i) for i in range(4)]
    with engine() as running:
        handles = [running.submit(ids(i), max_new_tokens=LIMIT) for i in range(4)]
        assert {done.request.tag: done.tokens for done in running.map(asked)} == {
            i: alone(i) for i in range(4)
        }
        assert [handle.result(PATIENCE).tokens for handle in handles] == [alone(i) for i in range(4)]


def test_closing_ends_what_is_not_complete_and_nobody_waits_for_ever():
    running = engine(seats=2)
    handles = [running.submit(ids(i), max_new_tokens=5000) for i in range(5)]
    seen = [[] for _ in handles]
    readers = [threading.Thread(target=seen[i].extend, args=(handle,)) for i, handle in enumerate(handles)]
    for reader in readers:
        reader.start()
    next(iter(handles[0]))
    closers = [threading.Thread(target=running.close) for _ in range(2)]
    for thread in (*closers, *readers):
        if thread in closers:
            thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    for handle, tokens in zip(handles, seen, strict=True):
        done = handle.result(0)
        assert (done.finish, list(done.tokens)) == ("cancelled", tokens)
    assert 0 < len(seen[0]) < 5000 and not seen[4]
    with pytest.raises(longthink.EngineError, match="closed"):
        running.submit(ids(0), max_new_tokens=1)
    with pytest.raises(longthink.EngineError, match="closed"):
        next(running.map([Request(key="0", tokens=(5,), max_new_tokens=1)]))
    running.close()


def test_an_engine_that_is_dropped_closes_itself_but_not_while_somebody_holds_a_handle():
    handle = engine().submit(ids(1), max_new_tokens=LIMIT)
    gc.collect()
    assert tuple(handle) == alone(1)
    endless = engine().submit(ids(1), max_new_tokens=5000)
    next(iter(endless))
    del endless, handle
    gc.collect()
    deadline = time.monotonic() + PATIENCE
    while small().config._attn_implementation != "sdpa" and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_result_that_takes_too_long():
    with engine() as running:
        handle = running.submit(ids(1), max_new_tokens=5000)
        with pytest.raises(TimeoutError, match=r"'0' is not done after 0\.01 s"):
            handle.result(0.01)
        assert not handle.done


def test_prompts_without_room_and_broken_numbers_are_errors_of_the_stream():
    with engine(decode_budget=None, budget=32) as running:
        long, short = running.submit([5] * 40, max_new_tokens=3), running.submit([5] * 3, max_new_tokens=3)
        with pytest.raises(longthink.BudgetError, match="prompt of 40 tokens"):
            list(long)
        assert (long.result().finish, long.result().tokens) == ("no_room", ())
        assert short.result(PATIENCE).finish == "length"
    broken = build("qwen2", num_hidden_layers=1)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with longthink.Engine(broken, policy="dense") as running:
        handle = running.submit(ids(1), max_new_tokens=3)
        with pytest.raises(longthink.NonFiniteError, match="NaN after"):
            list(handle)
        assert handle.result().finish == "nan"


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "no prompt tokens"),
        ([1, 97], {}, "token=97 is out of range: allowed is 0 to 96"),
        ([-1], {}, "token=-1"),
        ([1.5], {}, "token=1.5 must be an integer"),
        (torch.ones(2, 3, dtype=torch.int64), {}, r"tokens of shape \(2, 3\)"),
        ([1], dict(max_new_tokens=0), "max_new_tokens=0"),
        ([1], dict(sampling="hot"), "sampling='hot' must be a longthink.Sampling"),
        ([1], dict(sampling=dict(temperature=1.0)), "must be a longthink.Sampling"),
        ([1], dict(key=3), "key=3 must be a string"),
    ],
)
def test_requests_without_sense_are_refused_at_once(tokens, options, message):
    with engine() as running, pytest.raises(ValueError, match=message):
        running.submit(tokens, **dict(max_new_tokens=3) | options)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
def test_memory_is_constant_over_a_hundred_requests(compile, light_compiler):
    with engine("milestone", compile=compile) as running:
        held, threads = [], []
        gc.collect(), gc.freeze()  # what is older is no work for the collections to come, and changes nothing
        for _ in range(4):
            handles = [running.submit(ids(i % 6), max_new_tokens=1 + i % 7) for i in range(25)]
            assert all(handle.result(PATIENCE).finish == "length" for handle in handles)
            while running._scheduler._batch.occupied or (
                running._scheduler._batch._cache is not None and not compile
            ):
                time.sleep(0.01)
            del handles
            # The engine's thread may still hold the numbers of its last step.
            held.append(min(live_bytes(without=torch.empty(0)) for _ in range(5)))
            threads.append(threading.active_count())
        # Fifty requests later there is at most what two rows hold more.
        assert held[3] - held[1] < 16 * 1024
        assert threads[1] == threads[3]
