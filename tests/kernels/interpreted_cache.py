"""A model whose cache goes to the kernels decodes as one in torch. Run by `test_in_interpreter`."""

import pytest
import torch

import longthink
from longthink import kernels
from longthink.hf import DecodeStep
from longthink.kernels import reference_step, triton_book, triton_step
from longthink.policies import make_policy
from tests.models import build, prompt

STEPS, LAYERS, ALONE = 24, 2, 6
"""Of the steps, so many at the end have one row."""
BOOKED = (
    "raas:page_size=4", "raas:page_size=4:sharing=layer", "raas:page_size=4:used=alpha:alpha=0.05",
    "raas:page_size=4:score=exact:pin_prompt=false",
    "raas:page_size=4:score=exact:sharing=layer:used=alpha:alpha=0.02",
    "milestone:page_size=4:alpha=0.1:young=8", "recency:page_size=4", "fifo:page_size=4", "h2o",
)  # fmt: skip
OTHERS = {
    "raas:page_size=4:dense_layers=1": "step_attention",
    "random:page_size=4": "step_attention",
    "dense": "step_attention",
    "quest:page_size=4": "select_attention",
    "streaming_llm:positions=logical": "decode_attention",
}
CALLS = ("step_attention", "select_attention", "decode_attention", "bookkeep", "move_tokens")


@pytest.fixture
def made(monkeypatch):
    """How often each of the kernels' calls was made, in `kernels` and in its definition."""
    counts = dict.fromkeys(CALLS, 0)
    for module in (triton_step, triton_book, reference_step):
        for name in CALLS:
            if getattr(module, name, None) is not None and module is not reference_step:
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


def decode(model, spec, *, own_loop=True):
    """Logits of a prompt of two rows and the steps behind it, of which one row does the last ones; and the cache.

    Steps are ours, or those of the library's own loop.
    """
    policy = make_policy(spec)
    budget = {} if not policy.needs_budget else {"budget": 20} if policy.grows else {"decode_budget": 16}
    ids, mask = prompt((9, 14))
    token_NB = torch.randint(3, 90, (STEPS, 2), generator=torch.Generator().manual_seed(3))
    found = []
    with longthink.make_cache(model, policy=policy, **budget) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        step = DecodeStep(model, cache, compile=False)
        for i, token_B in enumerate(token_NB):
            if i == STEPS - ALONE:
                cache.keep_rows([1])
            token_B1 = token_B[-cache.rows :, None]
            position_B1 = cache.layers[0].slots.next_position_B[:, None]
            theirs = {"position_ids": position_B1, "past_key_values": cache}
            found.append(step(token_B1) if own_loop else model(token_B1, **theirs).logits[:, -1])
    return found, cache


def check(model, spec, monkeypatch, switch, **loop):
    wanted, plain = decode(model, spec)
    monkeypatch.setattr(kernels, switch, lambda tensor: True)
    got, fused = decode(model, spec, **loop)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(fused.layers, plain.layers, strict=True):
        mine, theirs = mine.slots.store.table, theirs.slots.store.table
        assert torch.equal(mine.position_BKS, theirs.position_BKS)
        torch.testing.assert_close(mine.kmin_BKPD, theirs.kmin_BKPD, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.kmax_BKPD, theirs.kmax_BKPD, atol=1e-4, rtol=1e-4)
        for name, tensor in theirs.state.items():
            torch.testing.assert_close(mine.state[name], tensor, atol=1e-3, rtol=1e-4)
    assert plain.policy.grows or plain.num_evicted >= 16


@pytest.mark.parametrize("spec", BOOKED)
def test_the_definition_keeps_the_books_of_all_layers(spec, model, monkeypatch):
    check(model, spec, monkeypatch, "fuses_append")


@pytest.mark.parametrize("spec", [*BOOKED, *OTHERS])
def test_each_layer_keeps_its_own_in_the_loop_of_the_library(spec, model, monkeypatch):
    check(model, spec, monkeypatch, "fuses_append", own_loop=False)


@pytest.mark.parametrize("spec", BOOKED)
def test_one_kernel_keeps_the_books_of_all_layers(spec, model, made, monkeypatch):
    check(model, spec, monkeypatch, "_goes_to_triton")
    policy = make_policy(spec)
    # The first turn of a page comes with the first token of each page size, in whichever row.
    turns = sum(any((n + i) % policy.page_size == 0 for n in (9, 14)[-rows(i) :]) for i in range(STEPS))
    stamps = STEPS if policy.name == "raas" else 0
    moves = LAYERS * turns if policy.name == "milestone" else 0
    assert made == {
        "step_attention": LAYERS * STEPS, "select_attention": 0, "decode_attention": 0,
        "bookkeep": turns + stamps, "move_tokens": moves,
    }  # fmt: skip


def rows(step):
    return 1 if step >= STEPS - ALONE else 2


@pytest.mark.parametrize("spec", OTHERS)
def test_other_policies_read_by_kernel_and_keep_their_own_books(spec, model, made, monkeypatch):
    check(model, spec, monkeypatch, "_goes_to_triton")
    attention = {name: count for name, count in made.items() if name.endswith("attention") and count}
    assert attention == {OTHERS[spec]: LAYERS * STEPS}
    # Where the first layer is dense, the second has books to be kept.
    assert (made["bookkeep"] > STEPS) == ("dense_layers" in spec)


@pytest.mark.parametrize(
    ("spec", "asked"), [("raas", False), ("random", True), ("milestone", False), ("h2o", False)]
)
def test_what_the_kernel_learns_is_not_learned_again(spec, asked, model, monkeypatch):
    seen = []
    monkeypatch.setattr(type(make_policy(spec)), "observe", lambda self, table, step: seen.append(step))
    monkeypatch.setattr(kernels, "_goes_to_triton", lambda tensor: True)
    decode(model, spec)
    assert len(seen) == (LAYERS * STEPS if asked else 0)
