"""Thousands of steps in constant memory, as the allocator of the GPU counts it."""

import pytest
import torch

from longthink.config import Budget
from longthink.hf import DecodeStep, PagedCache
from longthink.policies import make_policy
from tests.gpu.decoding import model_of, routes
from tests.models import prompt

pytestmark = pytest.mark.gpu
STEPS, EARLY = (4000, 600) if torch.cuda.is_available() else (300, 100)


def allocated() -> tuple[int, int]:
    """Bytes of tensors, and bytes taken from the GPU for them."""
    if not torch.cuda.is_available():
        return 0, 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@torch.no_grad()
def decode(step, token, steps: int):
    for _ in range(steps):
        token = step(token).argmax(-1, keepdim=True)
    return token


@pytest.mark.parametrize(
    ("spec", "route", "compile"),
    [(*case, False) for case in routes(["raas", "milestone", "h2o"])]
    + [(*case, True) for case in routes(["raas", "milestone"])],
)
def test_thousands_of_steps_take_no_more_memory(spec, route, compile, device, take_route, compiler):
    policy, model = make_policy(spec), model_of("qwen2", torch.bfloat16).to(device, torch.bfloat16)
    with PagedCache(model, policy, Budget(budget=64), fused=take_route(route, policy)) as cache:
        with torch.no_grad():
            ids, _ = prompt((21,))
            token = model(ids.to(device), past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        step = DecodeStep(model, cache, compile=compile)
        token = decode(step, token, EARLY)
        early = cache.kv_bytes, cache.metadata_bytes, *allocated()
        decode(step, token, STEPS - EARLY)
        assert (cache.kv_bytes, cache.metadata_bytes, *allocated()) == early
        assert cache.num_evicted == (21 + STEPS - len(cache.resident_positions(0)[0][0])) * 2 * 2
