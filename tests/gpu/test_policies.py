"""Every policy on Qwen2 and Llama, in the narrow formats of a GPU, against the CPU in float32.

Rounding may change which of two pages is worth more, and then all that follows. So what the GPU held is given to the
CPU, and its logits are compared with those of dense attention over just that; what it held is compared on its own,
loosely where it hangs on numbers.
"""

import pytest
import torch

from longthink.policies import SelectsPages, ShiftsKeys, make_policy
from tests.gpu.conftest import specs
from tests.gpu.decoding import decode, errors, logits_over, model_of, routes, shared

pytestmark = pytest.mark.gpu
BY_POSITION = ("dense", "quest", "recency", "streaming_llm", "random")
"""What these keep does not depend on the model's numbers."""
ERROR = {torch.bfloat16: 0.018, torch.float16: 0.0025}
"""Share of the logits' length by which they may be off in the middle, three times as much at most: twice what a CPU
in these formats is off."""


def reads_otherwise(policy) -> bool:
    """Whether the policy reads something else than all that it holds, where it stands."""
    shifts = isinstance(policy, ShiftsKeys) and policy.shifted_tokens() > 0
    return shifts or isinstance(policy, SelectsPages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize(("spec", "route"), routes(specs()))
def test_a_policy_in_a_narrow_format(spec, route, architecture, dtype, device, take_route):
    policy, model = make_policy(spec), model_of(architecture, dtype)
    narrow = model_of(architecture, dtype).to(device, dtype)
    got = decode(narrow, policy, take_route(route, policy))
    wanted = decode(model, policy, {})
    if policy.name in BY_POSITION:
        assert got.held == wanted.held
    else:
        assert shared(got.held, wanted.held) > 0.9
    reference = wanted.logits if reads_otherwise(policy) else logits_over(model, got.held)
    off = errors(got.logits, reference)
    assert off.median() < ERROR[dtype]
    # A page more or less changes a step of Quest as rounding does not.
    assert isinstance(policy, SelectsPages) or off.max() < 3 * ERROR[dtype]
