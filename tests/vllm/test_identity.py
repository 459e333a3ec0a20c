"""Tokens equal those of the same cache on Hugging Face, however vLLM schedules the requests."""

import pytest

from longthink.kernels.compiled import compile_isolated
from longthink.vllm import decoder
from tests.vllm.engines import (
    PAGE,
    allow_async_scheduling,
    engine,
    on_hugging_face,
    random_prompts,
    save_random_model,
    scheduler,
    serve,
    serve_and_preempt,
)

pytestmark = pytest.mark.slow
LENGTHS, BUDGET, COUNT = (21, 50, 33), 128, 720
PROMPTS = random_prompts(*LENGTHS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "policy",
    [
        "raas:sharing=layer",
        "raas",
        "raas:score=exact:sharing=layer",
        "milestone:alpha=0.05",
        "recall:page_size=16:alpha=0.05",
        "random",
        "recency:page_size=16",
    ],
)
def test_tokens_are_those_of_hugging_face(model, policy):
    with engine(model, policy, BUDGET) as llm:
        served = serve(llm, PROMPTS, COUNT)
    for prompt, tokens in zip(PROMPTS, served, strict=True):
        pages = -(-(len(prompt) + COUNT) // PAGE) - -(-len(prompt) // PAGE) - BUDGET // PAGE
        assert pages > 30  # evictions, in each layer
        assert tokens == on_hugging_face(model, policy, BUDGET, prompt, COUNT)
        # Eviction must matter, or any cache would pass.
        assert tokens != on_hugging_face(model, "dense", None, prompt, COUNT)


def test_nothing_changes_below_the_budget(model):
    with engine(model) as llm:
        dense = serve(llm, PROMPTS, 300)
    for policy in ("raas:sharing=layer", "milestone"):
        with engine(model, policy, 512) as llm:
            assert serve(llm, PROMPTS, 300) == dense


LONG = 300


@pytest.fixture(scope="module", params=["raas:sharing=layer", "milestone:alpha=0.05"])
def policy(request):
    return request.param


@pytest.fixture(scope="module")
def tokens(model, policy):
    """Tokens from an undisturbed engine."""
    with engine(model, policy) as llm:
        return serve(llm, PROMPTS, LONG)


def test_alone_and_preempted(model, policy, tokens):
    with engine(model, policy) as llm:
        assert [serve(llm, [prompt], LONG)[0] for prompt in PROMPTS] == tokens
        assert serve_and_preempt(llm, PROMPTS, LONG, at={210, 260}) == tokens


def test_compiled(model, policy, tokens, monkeypatch):
    made = []
    monkeypatch.setattr(
        decoder, "compile_isolated", lambda function: made.append(function) or compile_isolated(function)
    )
    with engine(model, policy, enforce_eager=False) as llm:
        assert serve(llm, PROMPTS, LONG) == tokens
        assert made == list(decoder._EAGER)
        # Replayed steps are eager.
        assert serve_and_preempt(llm, PROMPTS, LONG, at={210}) == tokens


def test_chunked_prefill(model, policy, tokens):
    with engine(model, policy, max_num_batched_tokens=16, enable_chunked_prefill=True) as llm:
        assert serve(llm, PROMPTS, LONG) == tokens
        # Replayed tokens come in chunks too.
        assert serve_and_preempt(llm, PROMPTS, LONG, at={220}) == tokens


def test_async_scheduling(model, policy, tokens, monkeypatch):
    allow_async_scheduling(monkeypatch)
    with engine(model, policy, async_scheduling=True) as llm:
        assert type(scheduler(llm)).__name__ == "AsyncScheduler"
        assert serve(llm, PROMPTS, LONG) == tokens
        assert serve_and_preempt(llm, PROMPTS, LONG, at={210, 260}) == tokens


def test_prefix_cache(model, policy, tokens):
    with engine(model, policy, enable_prefix_caching=True) as llm:
        hits = count_hits(llm)
        serve(llm, [PROMPTS[1] + [7] * 20, *PROMPTS], 40)
        assert serve(llm, PROMPTS, LONG) == tokens
        # milestone's state of prompt pages depends on the request.
        assert bool(hits) == policy.startswith("raas")


def test_generated_tokens_of_a_preempted_request_are_not_looked_up_in_the_prefix_cache(model, policy, tokens):
    with engine(model, policy, enable_prefix_caching=True) as llm:
        # Keep the cached blocks of a prompt that equals what the second request will have generated.
        scheduler(llm).kv_cache_manager.reset_prefix_cache = lambda: True
        serve(llm, [PROMPTS[1] + tokens[1][:250]], 5)
        assert serve_and_preempt(llm, PROMPTS, LONG, at={270}) == tokens


def test_tight_pool(model, policy, tokens):
    with engine(model, policy, pages=24, options={"max_prompt_tokens": 64}) as llm:
        preempted = count_preemptions(llm)
        assert serve(llm, PROMPTS, LONG) == tokens
        assert preempted


def count_hits(llm):
    """Record the tokens of each hit in the prefix cache."""
    manager, hits = scheduler(llm).kv_cache_manager, []
    inner = manager.get_computed_blocks

    def counted(request):
        found = inner(request)
        if found[1]:
            hits.append(found[1])
        return found

    manager.get_computed_blocks = counted
    return hits


def count_preemptions(llm):
    found, inner = [], scheduler(llm)._preempt_request

    def counted(request, *args, **kwargs):
        found.append(request.request_id)
        return inner(request, *args, **kwargs)

    scheduler(llm)._preempt_request = counted
    return found


def test_a_small_pool_is_enough_for_a_long_text(model):
    """The longest text needs 256 pages. Dense does not start with 40; a bounded cache uses 11 of them."""
    with pytest.raises(ValueError, match="max seq len"):
        with engine(model, pages=40):
            pass
    with engine(model, "raas:sharing=layer", pages=40, options={"max_prompt_tokens": 64}) as llm:
        manager = scheduler(llm).kv_cache_manager.coordinator.single_type_managers[0]
        most, inner = [], manager.allocate_new_blocks

        def allocate(request_id, *args, **kwargs):
            new = inner(request_id, *args, **kwargs)
            most.append(len(manager.req_to_blocks[request_id]))
            return new

        manager.allocate_new_blocks = allocate
        assert len(serve(llm, PROMPTS[2:], 1200)[0]) == 1200
        assert max(most) == -(-33 // PAGE) + BUDGET // PAGE


def test_reserved_requests_are_never_preempted(model):
    options = {"max_prompt_tokens": 64, "reserve": True}
    with engine(model, "raas:sharing=layer", pages=26, options=options) as llm:
        preempted = count_preemptions(llm)
        assert len(serve(llm, PROMPTS, 300)) == 3
        assert not preempted
