"""In float32 a GPU decides what the CPU decides, by the general route and by the fused kernels."""

import pytest
import torch

from longthink.policies import make_policy
from tests.gpu.conftest import specs
from tests.gpu.decoding import decode, model_of, routes

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("spec", "route"), routes(specs()))
def test_what_is_kept_and_read_is_that_of_the_cpu(spec, route, device, take_route):
    policy, model = make_policy(spec), model_of("qwen2", torch.float32)
    wanted = decode(model, policy, {})
    got = decode(model.to(device), policy, take_route(route, policy))
    assert all(layer.slots.is_fused for layer in got.cache.layers) == (route == "fused")
    assert got.held == wanted.held
    torch.testing.assert_close(got.logits, wanted.logits, atol=2e-3, rtol=2e-3)
