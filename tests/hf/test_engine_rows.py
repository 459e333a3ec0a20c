"""`Engine.map`: rows side by side, each as if it were alone."""

import gc
import itertools

import pytest
import torch

import longthink
from longthink.hf import Engine, Request, Sampling
from longthink.policies import grows, make_policy, needs_budget
from tests.grids import by_day, covering, slow_but
from tests.hf.test_conformance import VARIANTS
from tests.models import build, prompt

LENGTHS = (5, 40, 17, 90, 1, 33, 64, 12, 25, 48)
LIMITS = (36, 20, 45, 12, 30, 1, 26, 50, 8, 33)
POLICIES, MODELS = longthink.available_policies(), ("qwen2", "mistral")


def requests(lengths=LENGTHS, limits=LIMITS, **more):
    return [
        Request(
            key=f"p{i}",
            tokens=tuple(prompt((n,), seed=i)[0][0].tolist()),
            max_new_tokens=limit,
            tag=i,
            **more,
        )
        for i, (n, limit) in enumerate(zip(lengths, limits, strict=True))
    ]


def budget_of(policy, **given):
    return longthink.Budget(**given) if needs_budget(make_policy(policy)) else None


def finished(model, asked, policy, budget, **options):
    kept = {} if budget is None else {"budget": budget.budget, "decode_budget": budget.decode_budget}
    with Engine(model, policy=policy, **kept, **options) as engine:
        yield from engine.map(asked)


def stream(model, asked, policy, budget, **options):
    return {f.request.tag: f for f in finished(model, asked, policy, budget, **options)}


def alone(model, request, policy, budget, **options):
    """Tokens of one request by `longthink.generate`, and its cache."""
    given = {} if budget is None else {"budget": budget.budget, "decode_budget": budget.decode_budget}
    ids = torch.tensor([request.tokens])
    out = longthink.generate(
        model, ids, policy=policy, **given, max_new_tokens=request.max_new_tokens, do_sample=False,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return tuple(out.sequences[0, ids.shape[1] :].tolist()), out.past_key_values


def assert_as_alone(model, policy, budget, seats=4, count=10, **options):
    asked = requests(LENGTHS[:count], LIMITS[:count])
    done = stream(model, asked, policy, budget, seats=seats, **options)
    assert sorted(done) == list(range(len(asked)))
    evicted = 0
    for request in asked:
        got = done[request.tag]
        tokens, cache = alone(model, request, policy, budget)
        assert got.tokens == tokens
        assert got.finish == "length"
        assert (got.evicted, got.dense_kv_bytes) == (cache.num_evicted, cache.dense_kv_bytes)
        assert 1 <= got.rows <= seats
        evicted += got.evicted
    return evicted


@pytest.mark.parametrize(
    ("policy", "architecture"),
    slow_but(
        by_day(covering(POLICIES, MODELS), itertools.product(POLICIES, MODELS)),
        *(cell for cell in covering(POLICIES, MODELS) if cell[0] == "raas"),
    ),
)
def test_every_row_gets_the_tokens_that_it_gets_alone(architecture, policy):
    """Budgets count on top of the prompt, so each row has its own number of slots."""
    # In float64: a batch adds in another order, and of one layer the numbers are often near to each other.
    model = build(architecture, num_hidden_layers=1).double()
    evicted = assert_as_alone(model, policy, budget_of(policy, decode_budget=24))
    assert (evicted > 0) == (not grows(make_policy(policy)))


@pytest.mark.slow
@pytest.mark.parametrize("policy", VARIANTS)
def test_variants_too(policy):
    assert_as_alone(build("qwen2"), policy, budget_of(policy, decode_budget=24), count=6)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["streaming_llm", "h2o", "raas:pin_prompt=false", "quest"])
def test_prompts_longer_than_the_budget(policy):
    """Policies that trim the prompt start rows that are full at once, beside rows that are not."""
    model = build("qwen2", num_hidden_layers=1).double()
    assert_as_alone(model, policy, budget_of(policy, budget=32), seats=3, count=6)


def test_end_tokens_end_rows_and_first_tokens_may_end_them():
    model = build("qwen2")
    asked = requests()
    free = stream(model, asked, "dense", None, seats=4)
    ends = {free[0].tokens[20], free[7].tokens[0]}
    model.generation_config.eos_token_id = sorted(ends)
    done = stream(model, asked, "dense", None, seats=4)
    for request in asked:
        tokens = free[request.tag].tokens
        first = next((i for i, token in enumerate(tokens) if token in ends), None)
        assert done[request.tag].tokens == (tokens if first is None else tokens[: first + 1])
        assert done[request.tag].finish == ("length" if first is None else "stop")
    assert len(done[7].tokens) == 1


@pytest.mark.slow
def test_a_prompt_without_room_is_reported_and_the_others_go_on():
    model = build("qwen2")
    asked = requests()
    done = stream(model, asked, "raas", longthink.Budget(budget=64), seats=3)
    assert len(done) == len(asked)
    for request in asked:
        got = done[request.tag]
        if len(request.tokens) > 48:
            assert (got.finish, got.tokens) == ("no_room", ())
            assert f"prompt of {len(request.tokens)} tokens" in got.note
        else:
            assert got.tokens == alone(model, request, "raas", longthink.Budget(budget=64))[0]


@pytest.mark.slow
def test_slots_stay_within_the_budget_and_memory_follows_the_rows():
    """A stream holds what its rows need: long rows give their slots back when they have left."""
    model = build("qwen2")
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    asked = requests((200, *[10] * 8), (4, *[60] * 8))
    done = stream(model, asked, "recency:page_size=16", longthink.Budget(decode_budget=16), seats=2)
    # The long row has 13 pages and one more; as long as it is there its neighbour's row is as wide.
    assert done[0].kv_bytes_peak == done[1].kv_bytes_peak == 14 * 16 * per_token
    assert [done[i].kv_bytes_peak for i in range(2, 9)] == [2 * 16 * per_token] * 7
    dense = stream(model, asked, "dense", None, seats=2)
    assert all(dense[i].kv_bytes_peak < 128 * per_token for i in range(3, 9))


def test_rows_that_are_kept_hold_no_more_slots_than_they_need():
    model = build("qwen2")
    with longthink.make_cache(model, policy="fifo", decode_budget=16) as cache, torch.no_grad():
        model(prompt((60,))[0], past_key_values=cache)
        with cache.fresh() as short:
            model(prompt((10,))[0], past_key_values=short)
            needed = short.kv_bytes
            cache.adopt(1, short)
        assert cache.kv_bytes > 2 * needed
        cache.keep_rows([1])
        assert cache.kv_bytes == needed


@pytest.mark.slow
def test_model_and_memory_are_given_back_when_the_stream_is_dropped():
    def caches():
        gc.collect()
        return {id(o) for o in gc.get_objects() if type(o) is longthink.PagedCache}

    model, before = build("qwen2"), caches()
    running = finished(model, requests(), "raas", longthink.Budget(decode_budget=32), seats=4)
    next(running)
    assert caches() - before
    assert model.config._attn_implementation == "longthink"
    running.close()
    assert model.config._attn_implementation == "sdpa"
    assert not caches() - before


@pytest.mark.slow
def test_samples_depend_on_nothing_but_their_key():
    model = build("qwen2")
    sampling = Sampling(temperature=0.9, top_p=0.95, top_k=40)
    asked = requests(sampling=sampling)
    budget = longthink.Budget(decode_budget=32)
    together = stream(model, asked, "random", budget, seats=4)
    backwards = stream(model, asked[::-1], "random", budget, seats=3)
    for request in asked:
        (single,) = finished(model, [request], "random", budget)
        assert single.tokens == together[request.tag].tokens == backwards[request.tag].tokens
    other = Request(key="other", tokens=asked[2].tokens, max_new_tokens=90, sampling=sampling)
    (single,) = finished(model, [other], "random", budget)
    assert single.tokens != together[2].tokens


def test_nan_ends_its_row_alone():
    model = build("qwen2")
    asked = requests()
    fine = stream(model, asked, "raas", longthink.Budget(decode_budget=32), seats=4)
    poison = torch.full((1, model.config.hidden_size), torch.nan)
    weights = model.model.embed_tokens.weight
    bad = fine[2].tokens[30]
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        weights[bad] = poison
    done = stream(model, asked, "raas", longthink.Budget(decode_budget=32), seats=4)
    for request in asked:
        got, was = done[request.tag], fine[request.tag]
        if bad in request.tokens:
            assert (got.finish, got.tokens) == ("nan", ())
        elif bad in was.tokens[:-1]:
            assert got.finish == "nan"
            assert got.tokens == was.tokens[: was.tokens.index(bad) + 1]
            assert "NaN" in got.note
        else:
            assert (got.finish, got.tokens) == ("length", was.tokens)
    assert {f.finish for f in done.values()} == {"nan", "length"}


def test_times_are_told():
    (done,) = finished(build("qwen2"), requests()[:1], "dense", None)
    assert 0 < done.ms_per_token_early < 1000 and 0 < done.ms_per_token_late < 1000
    assert done.seconds >= (done.ms_per_token_early + done.ms_per_token_late) * (LIMITS[0] // 4) / 1000
    (short,) = finished(build("qwen2"), requests((9,), (7,)), "dense", None)
    assert short.ms_per_token_early is None and short.ms_per_token_late is None


def test_prompts_are_taken_one_by_one_as_there_is_room():
    taken = []

    def prompts():
        for request in requests():
            taken.append(request.tag)
            yield request

    running = finished(build("qwen2"), prompts(), "dense", None, seats=4)
    next(running)
    assert len(taken) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seats=0), "seats=0"),
        (dict(prefill_chunk_size=0), "prefill_chunk_size=0"),
        (dict(compile="on"), "compile='on' is not one of 'auto', True, False"),
        (dict(kv_dtype="int8"), "kv_dtype='int8'"),
        (dict(policy="raas"), "needs a budget"),
        (dict(policy="dense", budget=64), "keeps everything"),
        (dict(policy="nonsense"), "unknown policy"),
    ],
)
def test_refuses_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(build("qwen2"), **{"policy": "dense"} | options)


def test_refuses_requests_without_sense():
    with pytest.raises(ValueError, match="no prompt tokens"):
        Request(key="a", tokens=(), max_new_tokens=4)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        Request(key="a", tokens=(1,), max_new_tokens=0)


def test_adopting_from_another_kind_of_cache_is_refused():
    model = build("qwen2")
    ids, _ = prompt((20,))
    with torch.no_grad(), longthink.make_cache(model, budget=64) as cache:
        model(ids, past_key_values=cache)
        with longthink.make_cache(model, budget=128) as other:
            with pytest.raises(longthink.CacheStateError, match="same policy and budget"):
                cache.adopt(0, other)
        with longthink.make_cache(model, budget=64) as empty:
            with pytest.raises(longthink.CacheStateError, match="exactly one"):
                cache.adopt(0, empty)
