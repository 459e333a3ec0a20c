"""Which policies vLLM's blocks allow, and what the plugin says of the others: vLLM itself is not needed to know."""

import pytest

from longthink.errors import UnsupportedFeatureError
from longthink.policies import Policy, available_policies, make_policy
from longthink.vllm.config import PluginOptions

SERVED = ("fifo", "milestone", "raas", "random", "recall", "recency")
REASONS = {
    "dense": "keeps everything",
    "h2o": "may evict the prompt",
    "h2o:pin_prompt=true": "learns from the prompt's attention",
    "keydiff": "ranks single tokens",
    "lazy_eviction": "ranks single tokens",
    "lazy_eviction:pin_prompt=false": "may evict the prompt",
    "quest": "keeps everything",
    "r_kv": "ranks single tokens",
    "snapkv": "ranks single tokens",
    "snapkv:pin_prompt=false": "may evict the prompt",
    "streaming_llm": "may evict the prompt",
    "tova": "ranks single tokens",
    "tova:sharing=kv_head": "ranks single tokens",
    "tri_attention": "learns from the prompt's queries",
    "vase": "ranks single tokens",
    "vase:pin_prompt=false": "may evict the prompt",
}


def make(spec: str, block_size: int = 16) -> Policy:
    return PluginOptions(policy=spec, decode_budget=256).make_policy(block_size)


@pytest.mark.parametrize(("spec", "reason"), REASONS.items())
def test_what_blocks_do_not_allow_is_refused_with_the_reason(spec: str, reason: str) -> None:
    named = spec.replace("true", "True").replace("false", "False")
    said = f"policy '{named}' {reason}, which vLLM's blocks do not allow: allowed are"
    with pytest.raises(UnsupportedFeatureError, match=said):
        make(spec)


@pytest.mark.parametrize("spec", SERVED)
def test_a_policy_in_pages_is_served_in_pages_of_the_block_size(spec: str) -> None:
    assert make(spec).page_size == 16


def test_single_tokens_are_refused_in_blocks_of_one_token_too() -> None:
    """Blocks of one token would do, but the deferred observation of a page of steps was not made for them."""
    with pytest.raises(UnsupportedFeatureError, match="ranks single tokens"):
        make("lazy_eviction", block_size=1)


def test_every_policy_of_the_package_is_served_or_refused() -> None:
    ours = {
        name for name in available_policies() if type(make_policy(name)).__module__.startswith("longthink.")
    }
    assert ours | {"fifo"} == {spec.partition(":")[0] for spec in (*SERVED, *REASONS)}
