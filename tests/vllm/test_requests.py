"""Budgets of single requests: what they may ask for, and that each is served as a server with its budget would."""

import pytest

from longthink.vllm.config import requested_budget
from tests.vllm.engines import (
    PAGE,
    engine,
    on_hugging_face,
    random_prompts,
    save_random_model,
    scheduler,
    serve,
    serve_and_preempt,
)

SERVER, COUNT = 192, 520
BUDGETS = (64, None, 100, 16, SERVER)
PROMPTS = random_prompts(21, 50, 33, 48, 18)


@pytest.mark.parametrize(
    ("extra_args", "wanted"),
    [
        (None, None),
        ({}, None),
        ({"kv_transfer_params": {}, "longthinker": 3}, None),
        ({"longthink": {}}, None),
        ({"longthink": {"decode_budget": 512}}, 512),
        ({"longthink.decode_budget": 512, "other": 1}, 512),
    ],
)
def test_what_a_request_asks_for(extra_args, wanted):
    assert requested_budget(extra_args) == wanted


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"longthink": 512}, "longthink=512 must be a dictionary"),
        ({"longthink": {"buget": 512}}, "no option 'buget' for a request"),
        ({"longthink.policy": "raas"}, "no option 'policy' for a request"),
        ({"longthink": {"decode_budget": 512}, "longthink.decode_budget": 512}, "more than once"),
    ],
)
def test_what_a_request_cannot_ask_for(extra_args, message):
    with pytest.raises(ValueError, match=message):
        requested_budget(extra_args)


def test_the_check_suits_both_model_runners_of_vllm():
    from vllm.v1.sample.logits_processor import LogitsProcessor

    from longthink.vllm import compat, requests

    check = requests.DecodeBudget_1_64
    assert issubclass(check, (LogitsProcessor, *compat.second_logits_processor()))
    assert requests.DecodeBudget_1_64 is check
    logits = object()
    first, second = check(None, None, False), check(None, None)
    assert first.is_argmax_invariant() and first.apply(logits) is logits
    assert second.add_request(0, None) is False and second.apply(logits, None) is logits
    with pytest.raises(AttributeError, match="DecodeBudget_1"):
        requests.DecodeBudget_1  # noqa: B018


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["raas:sharing=layer", "recall:page_size=16:alpha=0.05"])
def policy(request):
    return request.param


@pytest.fixture(scope="module")
def wanted(model, policy):
    """Tokens of each prompt with its own budget, on Hugging Face."""
    return [
        on_hugging_face(model, policy, budget or SERVER, prompt, COUNT)
        for prompt, budget in zip(PROMPTS, BUDGETS, strict=True)
    ]


@pytest.mark.slow
def test_each_request_has_the_tokens_of_its_own_budget(model, policy, wanted):
    budgets = [budget and {"longthink": {"decode_budget": budget}} for budget in BUDGETS]
    with engine(model, policy, SERVER) as llm:
        held = count_blocks(llm)
        assert serve(llm, PROMPTS, COUNT, extra_args=budgets) == wanted
        # The blocks of one row of the worker's table belonged to another request before.
        assert serve(llm, PROMPTS[::-1], COUNT, extra_args=budgets[::-1]) == wanted[::-1]
        queries = scheduler(llm).kv_cache_config.kv_cache_groups[0].kv_cache_spec.query_blocks
        caps = {-(-len(p) // PAGE) + -(-(b or SERVER) // PAGE) for p, b in zip(PROMPTS, BUDGETS, strict=True)}
        assert held == {cap + queries for cap in caps}
        assert serve_and_preempt(llm, PROMPTS, COUNT, at={150, 380}, extra_args=budgets) == wanted
    # Each budget must matter, or any would pass.
    assert wanted[0] != on_hugging_face(model, policy, SERVER, PROMPTS[0], COUNT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{"enable_prefix_caching": True}, {"reserve": True}], ids=["cached", "reserved"]
)
def test_budgets_with_shared_prompts_and_reserved_blocks(model, more):
    """One prompt with several budgets: its cached blocks serve them all."""
    policy, prompt = "raas:sharing=layer", PROMPTS[3]
    budgets = (32, 128, None)
    wanted = [on_hugging_face(model, policy, budget or SERVER, prompt, COUNT) for budget in budgets]
    extra = [budget and {"longthink.decode_budget": budget} for budget in budgets]
    options = {"reserve": True, "max_prompt_tokens": 64} if "reserve" in more else None
    caching = more.get("enable_prefix_caching", False)
    with engine(model, policy, SERVER, options=options, enable_prefix_caching=caching) as llm:
        assert serve(llm, [prompt] * 3, COUNT, extra_args=extra) == wanted
        assert serve(llm, [prompt] * 3, COUNT, extra_args=extra) == wanted


@pytest.mark.slow
def test_budgets_are_checked_before_a_token_is_made(model):
    from vllm.exceptions import VLLMValidationError

    with engine(model, "recall:page_size=16", SERVER) as llm:
        for budget, message in ((SERVER + 1, "allowed is 1 to 192"), (0, "out of range"), ("64", "integer")):
            with pytest.raises(VLLMValidationError, match=f"decode_budget={budget!r}.*{message}"):
                serve(llm, PROMPTS[:1], 2, extra_args=[{"longthink": {"decode_budget": budget}}])
        assert len(serve(llm, PROMPTS[:1], 2)[0]) == 2


def count_blocks(llm):
    """Most blocks that each finished request held."""
    manager, most = scheduler(llm).kv_cache_manager.coordinator.single_type_managers[0], set()
    inner = manager.pop_blocks_for_free

    def pop(request_id):
        blocks = inner(request_id)
        most.add(sum(not block.is_null for block in blocks))
        return blocks

    manager.pop_blocks_for_free = pop
    return most
