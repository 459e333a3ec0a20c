"""The compiled step, which a GPU replays as CUDA graphs, writes what the eager one writes."""

import pytest
import torch
from torch._dynamo.utils import counters

import longthink
from longthink.policies import grows, make_policy
from tests.gpu.decoding import STEPS, decode, model_of, routes

pytestmark = pytest.mark.gpu


@pytest.fixture
def replays(monkeypatch):
    """How often a CUDA graph was replayed."""
    count = [0]
    if torch.cuda.is_available():
        replay = torch.cuda.CUDAGraph.replay

        def counted(graph):
            count[0] += 1
            replay(graph)

        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return count


@pytest.mark.parametrize(("spec", "route"), routes(list(longthink.available_policies())))
def test_the_compiled_step_keeps_and_reads_what_the_eager_one_does(
    spec, route, device, take_route, compiler, replays
):
    policy, model = make_policy(spec), model_of("qwen2", torch.float32).to(device)
    fused = take_route(route, policy)
    eager = decode(model, policy, fused)
    compiled = decode(model, policy, fused, compile=True)
    assert compiled.held == eager.held
    torch.testing.assert_close(compiled.logits, eager.logits, atol=2e-3, rtol=2e-3)
    if torch.cuda.is_available() and not grows(policy):
        assert counters["inductor"]["cudagraph_skips"] == 0
        assert replays[0] >= STEPS - 3, "the first steps warm up and record"
