"""Bookkeeping and token copies against their definition. Run by `test_in_interpreter`."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longthink.kernels import reference_step as definition
from longthink.kernels import triton_book
from longthink.kernels.reference_step import Rule, Turn, Used
from tests.kernels.cases import copied

BAD = (float("nan"), float("inf"), -float("inf"), -0.0, 0.0)


@st.composite
def turns(draw):
    """Turns of two layers with few distinct scores, stamps and pages, so that ties are common."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    layers, rows, tables, shared = 2, chance.choice((1, 2)), chance.choice((1, 2)), chance.choice((1, 3))
    size, slots = chance.choice((1, 4, 16)), chance.choice((1, 3, 8, 13, 13))
    position = torch.full((layers * rows, tables, slots, size), -1, dtype=torch.int32)
    now = torch.tensor([chance.randint(0, (slots + 4) * size) for _ in range(rows)])
    if chance.random() < 0.7:  # the next token opens a page
        now = (now // size + 1) * size - 1
    for n in range(layers * rows):
        last = int(now[n % rows]) // size
        for table in position[n]:
            held = chance.sample(range(last + 1), min(last + 1, chance.randint(0, slots)))
            for slot, page in zip(chance.sample(range(slots), len(held)), held, strict=True):
                table[slot] = page * size + torch.arange(size)
                table[slot][table[slot] > now[n % rows]] = -1

    def some(low, high):
        return torch.tensor([chance.randint(low, high) for _ in range(rows)])

    def numbers(*shape):
        values = torch.tensor(
            [chance.choice((1.0, 2.0, 1.0, 2.0, -1.5, *BAD)) for _ in range(torch.Size(shape).numel())]
        )
        return values.view(shape)

    stamp = torch.tensor(
        [chance.randint(0, 2) for _ in range(layers * rows * tables * slots)], dtype=torch.int32
    )
    stamp = stamp.view(-1, tables, slots)
    score = numbers(layers * rows, tables * shared if tables == 1 else tables, slots)
    share = chance.choice((0.0, 0.3, 0.5, 0.5, 1.0))
    used = chance.choice(
        (None, Used(stamp, score, share), Used(stamp, score, share), Used(stamp, score, None, 0.5))
    )
    prompt = some(0, 2 * size)
    turn = Turn(
        position.flatten(2),
        torch.zeros(layers * rows, tables, dtype=torch.int64),
        now,
        prompt,
        some(1, slots),
        size,
        Rule(
            chance.choice((prompt, torch.zeros_like(prompt))),
            chance.choice((None, some(0, 3))),
            chance.choice((None, some(0, 3))),
        ),
        chance.choice((None, stamp, numbers(layers * rows, tables, slots))),
    )
    return turn, used


@settings(max_examples=60, deadline=None)
@given(turns())
def test_bookkeeping(case):
    turn, used = case
    slow_used, fast_used = (None if used is None else copied(used) for _ in range(2))
    slow, fast = copied(turn), copied(turn)
    if used is not None and turn.priority_NKP is used.stamp_NKP:  # what was just stamped decides
        slow = slow._replace(priority_NKP=slow_used.stamp_NKP)
        fast = fast._replace(priority_NKP=fast_used.stamp_NKP)
    full = definition.bookkeep(slow, slow_used)
    assert torch.equal(triton_book.bookkeep(fast, fast_used), full)
    assert torch.equal(fast.tail_NK, slow.tail_NK)
    if used is not None:
        assert torch.equal(fast_used.stamp_NKP, slow_used.stamp_NKP)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("share, pages, best", [(0.3, 170, 51), (0.5, 7, 4), (0.1, 10, 1)])
def test_a_share_of_the_pages_counts_as_the_decimal_fraction(share, pages, best, ties):
    position = torch.arange(pages, dtype=torch.int32)[None, None]
    row = torch.tensor([pages - 1])
    turn = Turn(position, torch.zeros(1, 1, dtype=torch.int64), row, row * 0, row + 5, 1, Rule(row * 0))
    stamp = torch.full((1, 1, pages), -1, dtype=torch.int32)
    score = torch.arange(pages, dtype=torch.float32).flip(0)[None, None]
    triton_book.bookkeep(turn, Used(stamp, score * (not ties), share))
    assert (stamp[0, 0, :best] == pages - 1).all() and (stamp[0, 0, best:-1] == -1).all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dim", [64, 80])
def test_moves(dim, shared):
    draw = random.Random(dim)
    rows, heads, slots, size = 2, 3, 5, 16
    tables, tokens = 1 if shared else heads, slots * size
    keys, values = torch.randn(2, rows, heads, tokens, dim)
    position = torch.arange(tokens, dtype=torch.int32).repeat(rows, tables, 1)
    state = None if shared else torch.arange(rows * tables * tokens).view(rows, tables, tokens).to(torch.int8)
    source = (torch.randint(slots, (rows, tables, 1)) * size + torch.arange(size)).contiguous()
    target = source.clone()
    for row in range(rows):
        for table in range(tables):
            free = [t for t in range(tokens) if t not in source[row, table]]
            for pair in draw.sample(range(size), draw.randint(0, size)):
                target[row, table, pair] = free.pop(draw.randrange(len(free)))
    before = (keys, values, position, state)
    slow, fast = ([None if x is None else x.clone() for x in before] for _ in range(2))
    definition.move_tokens(*slow, source, target)
    triton_book.move_tokens(*fast, source, target)
    assert not torch.equal(slow[0], keys)
    for wanted, got in zip(slow, fast, strict=True):
        assert wanted is None or torch.equal(got, wanted)
