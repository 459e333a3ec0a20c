"""Which policies vLLM's blocks allow, and what is said of the others: nothing of vLLM is needed for that."""

import pytest

from longthink.errors import UnsupportedFeatureError
from longthink.policies import available_policies, make_policy
from longthink.vllm.config import PluginOptions

REASONS = {
    "dense": "keeps everything",
    "h2o": "may evict the prompt",
    "h2o:pin_prompt=true": "learns from the prompt's attention",
    "lazy_eviction": "evicts single tokens",
    "lazy_eviction:pin_prompt=false": "may evict the prompt",
    "quest": "keeps everything",
    "streaming_llm": "may evict the prompt",
    "tri_attention": "learns from the prompt's queries",
    "vase": "evicts single tokens",
    "vase:pin_prompt=false": "may evict the prompt",
}
SERVED = ("fifo", "milestone", "raas", "random", "recency")


def make(spec: str):
    return PluginOptions(policy=spec, decode_budget=256).make_policy(16)


@pytest.mark.parametrize("spec", REASONS)
def test_a_policy_that_blocks_do_not_allow_is_refused_with_the_reason(spec):
    said = f"policy '{spec.replace('true', 'True').replace('false', 'False')}' {REASONS[spec]}, which vLLM's blocks"
    with pytest.raises(UnsupportedFeatureError, match=said):
        make(spec)


@pytest.mark.parametrize("spec", SERVED)
def test_a_policy_in_pages_is_served_in_pages_of_the_block_size(spec):
    assert make(spec).page_size == 16


def test_single_tokens_are_refused_in_blocks_of_one_token_too():
    """Blocks of one token would do, but the deferred observation of a page of steps was not made for them."""
    with pytest.raises(UnsupportedFeatureError, match="evicts single tokens"):
        PluginOptions(policy="lazy_eviction", decode_budget=256).make_policy(1)


def test_every_policy_of_the_package_is_served_or_refused():
    ours = {
        name for name in available_policies() if type(make_policy(name)).__module__.startswith("longthink.")
    }
    assert ours <= {spec.partition(":")[0] for spec in (*REASONS, *SERVED)}
