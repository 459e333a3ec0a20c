"""Stamps, evictions and token copies against the general route, on random tables. Run by `test_in_interpreter`."""

import random
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longthink.accelerators import triton_tables
from longthink.accelerators.table import FUSED
from longthink.cache.step import choose_slots, evictable_pages
from longthink.cache.store import SlotStore
from longthink.policies import Milestone, Moves, SavesTokens, Step, make_policy
from longthink.policies.base import holds_first
from tests.kernels.cases import assert_same, changed

LAYERS = 2
POLICIES = (
    "recency", "recency:page_size=4", "fifo",
    "raas:r=0.3:page_size=4", "raas:page_size=1", "raas:pin_prompt=false", "raas:sharing=layer",
    "raas:r=0:sharing=layer:page_size=4", "raas:r=1:page_size=4:pin_prompt=false",
    "raas:used=alpha:alpha=0.5:page_size=4", "raas:used=alpha:alpha=0.5:sharing=layer:page_size=1",
    "milestone:page_size=4:young=4:keep=0.5", "milestone:page_size=4:young=12", "milestone:young=16",
    "h2o", "h2o:heavy=0.8", "h2o:pin_prompt=true:heavy=0.3",
)  # fmt: skip
NUMBERS = (1.0, 2.0, 1.0, 2.0, 0.5, -1.5, float("nan"), float("inf"), -float("inf"), -0.0, 0.0)


def drawn(chance: random.Random, like: Tensor) -> Tensor:
    """Few distinct numbers, so that ties are common."""
    values = NUMBERS if like.is_floating_point() else (0, 1, 2)
    return torch.tensor([chance.choice(values) for _ in range(like.numel())], dtype=like.dtype).view_as(like)


@st.composite
def layers(draw, spec):
    """Tables of all layers of a policy, layer after layer, the slots that they had before, and scores of a step."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    policy, rows, heads = make_policy(spec), chance.choice((1, 2)), chance.choice((1, 3))
    size, slots = policy.page_size, chance.choice((1, 3, 8, 13, 13))
    caps = [chance.randint(max(1, slots - 3), slots) for _ in range(rows)]
    whole = SlotStore(policy, torch.zeros(LAYERS * rows, heads, 0, 1), caps * LAYERS, slots)
    now = [chance.randint(1, (slots + 4) * size) for _ in range(rows)]
    if chance.random() < 0.7:  # the next token opens a page
        now = [-(-n // size) * size for n in now]
    table = whole.table
    table.now_B.copy_(torch.tensor(now * LAYERS))
    prompts = [min(chance.randint(0, 2 * size), now[row], slots * size) for row in range(rows)]
    table.prompt_B.copy_(torch.tensor(prompts * LAYERS))
    paged = table.position_BKS.unflatten(-1, (-1, size))
    for n in range(LAYERS * rows):
        pages = -(-now[n % rows] // size)
        # A pinned prompt is there as a whole.
        first = -(-prompts[n % rows] // size) if policy.pins_prompt() else 0
        for head in paged[n]:
            most = min(pages, slots) - first
            held = chance.sample(range(first, pages), chance.choice((most, chance.randint(0, most))))
            places = chance.sample(range(slots), slots)
            if isinstance(policy, SavesTokens):
                # Where slots count from the end of the prompt, it is in the first ones, as after a prefill.
                places = [*range(first), *chance.sample(range(first, slots), slots - first)]
            for slot, page in zip(places, [*range(first), *held], strict=False):
                head[slot] = page * size + torch.arange(size)
                head[slot][head[slot] >= now[n % rows]] = -1
    for tensor in (whole.tail_BK, *table.state.values()):
        tensor.copy_(drawn(chance, tensor).clamp(max=slots - 1))
    if "stamp" in table.state:  # no page has been used in the future
        stamp_NKP = table.state["stamp"]
        stamp_NKP.copy_(torch.minimum(stamp_NKP, (table.now_B - 1)[:, None, None]))
    whole.user_BKP.copy_((table.page_BKP >= 0) & holds_first(table, table.prompt_B))
    return whole, drawn(chance, torch.empty(LAYERS * rows, heads, slots))


def evict(policy, whole, score_NKP=None) -> Tensor:
    """Call the kernel as a group of layers does."""
    fused, rows = FUSED[type(policy)](policy), len(whole.tail_BK) // LAYERS
    first = changed(whole, lambda tensor: tensor[:rows])
    stamping = None if score_NKP is None else fused.stamp_rule(whole.table, score_NKP)
    return triton_tables.evict(whole, first, fused.eviction_rule(first.table, whole.table), stamping)


def stamp(policy, table, score_NKP):
    """Stamp as `RaaS.observe` does, in a step whose token stood before `now_B`."""
    table.now_B.sub_(1)
    score = Step(None, None, 1.0).max_over_heads(score_NKP) if policy.sharing == "layer" else score_NKP
    policy.stamp(table, score)
    table.now_B.add_(1)


def slots_of_next_pages(policy, whole) -> tuple[Tensor, Tensor, Tensor]:
    """Tails and whether a page is evicted, by the general route; and where that has a meaning."""
    table = whole.table
    opens_N = table.now_B % policy.page_size == 0
    slot_NK, _ = choose_slots(policy, table, opens_N, evicts=True)
    full_NK = ((table.page_BKP >= 0).sum(-1) >= table.cap_B[:, None]) & opens_N[:, None]
    # No policy protects all pages of a full table.
    known_NK = ~full_NK | evictable_pages(policy, table).any(-1)
    return torch.where(opens_N[:, None], slot_NK, whole.tail_BK), full_NK, known_NK


@pytest.mark.parametrize("spec", POLICIES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_tables(spec, data):
    whole, score_NKP = data.draw(layers(spec))
    policy = make_policy(spec)
    slow, fast = deepcopy(whole), deepcopy(whole)
    # A kernel that also stamps chooses by the new stamps.
    for scores in (None, score_NKP) if policy.name == "raas" else (None,):
        if scores is not None:
            stamp(policy, slow.table, scores)
        tail_NK, full_NK, known_NK = slots_of_next_pages(policy, slow)
        assert torch.equal(evict(policy, fast, scores), full_NK)
        slow.tail_BK.copy_(torch.where(known_NK, tail_NK, fast.tail_BK))
        assert_same(fast, slow)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("share, pages, best", [(0.3, 170, 51), (0.07, 100, 7), (0.5, 7, 4)])
def test_a_share_of_the_pages_counts_as_the_decimal_fraction(share, pages, best, ties):
    policy = make_policy(f"raas:page_size=1:r={share}")
    whole = SlotStore(policy, torch.zeros(LAYERS, 1, 0, 1), [pages] * LAYERS, pages)
    whole.table.position_BKS.copy_(torch.arange(pages))
    whole.table.now_B.fill_(pages)
    stamp_NKP = whole.table.state["stamp"].fill_(-1)
    score_NKP = torch.arange(pages, dtype=torch.float32).flip(0).repeat(LAYERS, 1, 1)
    evict(policy, whole, score_NKP * (not ties))
    assert (stamp_NKP[..., :best] == pages - 1).all() and (stamp_NKP[..., best:-1] == -1).all()


class OneTable(Milestone):
    """The layer's heads share a table: the kernel may write to it only once."""

    def tables(self, kv_heads):
        return 1


@pytest.mark.parametrize("policy", [Milestone(), OneTable()], ids=["milestone", "one table"])
@pytest.mark.parametrize("dim", [64, 80])
def test_moves(dim, policy):
    draw, slots, size = random.Random(dim), 5, policy.page_size
    slow = SlotStore(policy, torch.empty(2, 3, 0, dim), [slots] * 2, slots)
    rows, tables, tokens = slow.table.position_BKS.shape
    generator = torch.Generator().manual_seed(dim)
    for tensor in (slow.keys_BKSD, slow.values_BKSD):
        tensor.normal_(generator=generator)
    slow.table.position_BKS.copy_(torch.arange(tokens))
    slow.table.state["marked"].random_(0, 2, generator=generator)
    source = torch.randint(slots, (rows, tables, 1), generator=generator) * size + torch.arange(size)
    target = source.clone()
    for row in range(rows):
        for table in range(tables):
            free = [t for t in range(tokens) if t not in source[row, table]]
            for pair in draw.sample(range(size), draw.randint(1, size)):
                target[row, table, pair] = free.pop(draw.randrange(len(free)))
    fast = deepcopy(slow)
    slow.move(Moves(source, target))
    triton_tables.move_tokens(fast, Moves(source, target), fast.table.state["marked"])
    assert not slow.table.resident_BKS.all()
    assert_same(fast, slow)
    for tensor in ("keys_BKSD", "values_BKSD"):
        assert torch.equal(getattr(fast, tensor), getattr(slow, tensor))
