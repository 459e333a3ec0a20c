"""A whole model decodes by the kernels as by the general route. Run by `test_in_interpreter`."""

import pytest
import torch

import longthink
from longthink import kernels
from longthink.accelerators import attention, triton_tables
from longthink.accelerators.table import FUSED
from longthink.hf import DecodeStep
from longthink.kernels import triton_decode
from longthink.policies import SavesTokens, make_policy, needs_budget
from tests.grids import by_day
from tests.kernels.cases import assert_same
from tests.models import build, prompt

LAYERS, PROMPTS, BUDGET = 2, (9, 14), 8
STEPS, THEIRS, ALONE = 19, range(11, 15), 15
"""Steps in all; those by the library's own loop; and from where on the second row is alone. Pages are evicted in
each part: from the first row in steps 11 and 15, from the second in 10, 14 and 18."""
GROUPED = (
    "raas:page_size=4", "raas:page_size=4:sharing=layer", "raas:page_size=4:used=alpha:alpha=0.05",
    "raas:page_size=4:score=exact:pin_prompt=false",
    "raas:page_size=4:score=exact:sharing=layer:used=alpha:alpha=0.02",
    "milestone:page_size=4:alpha=0.1:young=4", "recency:page_size=4", "recency", "h2o", "h2o:pin_prompt=true",
)  # fmt: skip
OTHERS = {
    "raas:page_size=4:dense_layers=1": ("decode_attention", "step_attention"),
    "quest:page_size=4": ("select_attention", "select_attention"),
    "random:page_size=4": ("decode_attention", "decode_attention"),
    "dense": ("decode_attention", "decode_attention"),
    "streaming_llm": ("decode_attention", "decode_attention"),
}
"""What reads in either layer."""
BY_NIGHT = {
    "raas:page_size=4:sharing=layer", "raas:page_size=4:used=alpha:alpha=0.05",
    "raas:page_size=4:score=exact:pin_prompt=false", "recency", "h2o:pin_prompt=true", "random:page_size=4",
    "streaming_llm",
}  # fmt: skip
"""Of these another one takes the same way through the kernels; `interpreted_attention` has their own steps."""
CALLS = {
    "step_attention": attention,
    "select_attention": attention,
    "decode_attention": triton_decode,
    "evict": triton_tables,
    "move_tokens": triton_tables,
}


@pytest.fixture
def made(monkeypatch):
    """How often each of the calls that launch kernels was made."""
    counts = dict.fromkeys(CALLS, 0)
    for name, module in CALLS.items():
        monkeypatch.setattr(module, name, counting(counts, name, getattr(module, name)))
    return counts


def counting(counts, name, run):
    def counted(*args, **kwargs):
        counts[name] += 1
        return run(*args, **kwargs)

    return counted


@pytest.fixture(scope="module")
def model():
    return build("qwen2", num_hidden_layers=LAYERS)


def decode(model, policy):
    """Logits of two prompts and the steps behind them, some of them by the library's own loop; and the cache."""
    budget = {"decode_budget": BUDGET} if needs_budget(policy) else {}
    ids, mask = prompt(PROMPTS)
    token_NB = torch.randint(3, 90, (STEPS, 2), generator=torch.Generator().manual_seed(3))
    found = []
    with longthink.make_cache(model, policy=policy, **budget) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        step = DecodeStep(model, cache, compile=False)
        for i, token_B in enumerate(token_NB):
            if i == ALONE:
                cache.keep_rows([1])
            token_B1 = token_B[-cache.rows :, None]
            if i in THEIRS:
                position_B1 = cache.layers[0].slots.next_position_B[:, None]
                theirs = {"position_ids": position_B1, "past_key_values": cache}
                found.append(model(token_B1, **theirs).logits[:, -1])
            else:
                found.append(step(token_B1))
    return found, cache


def check(model, policy, monkeypatch):
    """Decode by the general route, and as on a GPU."""
    wanted, plain = decode(model, policy)
    monkeypatch.setattr(kernels, "runs_triton", lambda tensor: True)
    if type(policy) in FUSED:
        # What the kernel learns is not learned again.
        monkeypatch.setattr(type(policy), "observe", None)
    got, fused = decode(model, policy)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(fused.layers, plain.layers, strict=True):
        assert_same(mine.slots.store, theirs.slots.store, written=1e-4, learned=1e-3)
    assert plain.policy.bounds != "memory" or plain.num_evicted >= 24


@pytest.mark.parametrize("spec", by_day([s for s in GROUPED if s not in BY_NIGHT], GROUPED))
def test_one_kernel_keeps_the_tables_of_all_layers(spec, model, made, monkeypatch):
    policy = make_policy(spec)
    check(model, policy, monkeypatch)
    ours = [i for i in range(STEPS) if i not in THEIRS]
    turns = sum(any((n + i) % policy.page_size == 0 for n in PROMPTS[1 if i >= ALONE else 0 :]) for i in ours)
    stamps = len(ours) if policy.name == "raas" else 0
    assert made == {
        "step_attention": LAYERS * STEPS, "select_attention": 0, "decode_attention": 0,
        "evict": turns + stamps, "move_tokens": LAYERS * turns if isinstance(policy, SavesTokens) else 0,
    }  # fmt: skip


@pytest.mark.parametrize("spec", by_day([s for s in OTHERS if s not in BY_NIGHT], OTHERS))
def test_other_layers_keep_their_own_tables(spec, model, made, monkeypatch):
    check(model, make_policy(spec), monkeypatch)
    reads = {name: count for name, count in made.items() if name.endswith("attention") and count}
    assert reads == {name: OTHERS[spec].count(name) * STEPS for name in OTHERS[spec]}
    # Where the first layer is dense, the second is a group of its own.
    assert (made["evict"] > 0) == ("dense_layers" in spec)


def test_every_policy_with_kernels_is_tried():
    assert {type(make_policy(spec)) for spec in (*GROUPED, *OTHERS)} >= FUSED.keys()
