"""Which policies the plugin refuses, and that it says why: vLLM itself is not needed to know."""

import pytest

from longthink.errors import UnsupportedFeatureError
from longthink.policies import available_policies, make_policy
from longthink.vllm.config import PluginOptions, check_policy

SERVED = {"milestone", "raas", "random", "recency"}
REASONS = {
    "dense": "keeps everything",
    "h2o": "may evict the prompt",
    "h2o:pin_prompt=true": "learns from the prompt's attention",
    "keydiff": "ranks single tokens",
    "quest": "keeps everything",
    "r_kv": "ranks single tokens",
    "snapkv": "ranks single tokens",
    "snapkv:pin_prompt=false": "may evict the prompt",
    "streaming_llm": "may evict the prompt",
    "tova:sharing=kv_head": "ranks single tokens",
    "tova": "ranks single tokens",
}


@pytest.mark.parametrize(("policy", "reason"), REASONS.items())
def test_what_blocks_do_not_allow_is_refused_with_the_reason(policy: str, reason: str) -> None:
    options = PluginOptions(policy=policy, decode_budget=64)
    with pytest.raises(
        UnsupportedFeatureError, match=f"{reason}, which vLLM's blocks do not allow: allowed are"
    ):
        options.make_policy(16)


@pytest.mark.parametrize("policy", sorted(SERVED))
def test_what_they_allow_is_served(policy: str) -> None:
    check_policy(PluginOptions(policy=policy, decode_budget=64).make_policy(16))


def test_nothing_is_forgotten() -> None:
    ours = {n for n in available_policies() if type(make_policy(n)).__module__.startswith("longthink.")}
    assert ours == SERVED | {policy.partition(":")[0] for policy in REASONS}
