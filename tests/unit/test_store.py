"""Slots: moving tokens, growing, taking rows apart."""

import pytest
import torch

from longthink.cache.store import SlotStore
from longthink.policies import Moves, Policy, Shape


class Noted(Policy):
    """Carries one number for each token and one for each page."""

    name = "noted"

    def init_state(self, shape: Shape, device):
        return {
            "token": torch.zeros(shape.B, shape.K, shape.P * shape.T),
            "page": torch.zeros(shape.B, shape.K, shape.P),
        }


@pytest.fixture
def store() -> SlotStore:
    """Two rows, two heads, pages of 4 in 4 slots; 12 tokens, whose keys are their positions."""
    keys = torch.arange(12.0).view(1, 1, 12, 1).expand(2, 2, 12, 3).contiguous()
    filled = SlotStore(Noted(page_size=4), keys, [4, 4], 4)
    filled.fill(keys, -keys, torch.arange(12).expand(2, 12), None)
    filled.table.state["token"][..., :12] = torch.arange(12.0)
    return filled


def held(store: SlotStore, row: int, head: int) -> dict[int, tuple[int, float, float, float]]:
    """What each filled token slot holds: position, key, value and note."""
    position = store.table.position_BKS[row, head].tolist()
    numbers = zip(
        store.keys_BKSD[row, head, :, 0].tolist(),
        store.values_BKSD[row, head, :, 0].tolist(),
        store.table.state["token"][row, head].tolist(),
        strict=True,
    )
    return {slot: (p, *rest) for slot, (p, rest) in enumerate(zip(position, numbers, strict=True)) if p >= 0}


def test_moved_tokens_are_at_their_target_and_nowhere_else(store):
    source = torch.tensor([5, 7, 2]).expand(2, 2, 3)
    target = torch.tensor([12, 14, 2]).expand(2, 2, 3)  # the last pair moves nothing
    store.move(Moves(source, target))
    expected = {slot: slot for slot in range(12)} | {12: 5, 14: 7}
    del expected[5], expected[7]
    for row in range(2):
        for head in range(2):
            now = held(store, row, head)
            assert {slot: content[0] for slot, content in now.items()} == expected
            assert all(content == (p := content[0], p, -p, p) for content in now.values())


def test_moving_onto_a_token_replaces_it(store):
    store.move(Moves(torch.tensor([9, 1]).expand(2, 2, 2), torch.tensor([1, 3]).expand(2, 2, 2)))
    positions = [content[0] for content in held(store, 0, 1).values()]
    assert held(store, 0, 1)[1] == (9, 9.0, -9.0, 9.0)
    assert held(store, 0, 1)[3] == (1, 1.0, -1.0, 1.0)
    assert len(positions) == len(set(positions))
    assert 3 not in positions


def test_growing_keeps_what_is_there(store):
    before = held(store, 1, 0)
    store.table.state["page"] += 3
    store.reserve(7)
    assert store.pages == 7
    assert held(store, 1, 0) == before
    assert store.table.state["page"][1, 0].tolist() == [3, 3, 3, 3, 0, 0, 0]
    assert store.table.state["token"].shape[2] == 28
    store.reserve(3)
    assert store.pages == 7


def test_opening_a_slot_leaves_nothing_of_its_old_page(store):
    store.table.state["page"] += 3
    store.open_pages(torch.tensor([[1, 0], [2, 2]]), torch.tensor([True, False]))
    assert store.tail_BK[0].tolist() == [1, 0]
    assert set(held(store, 0, 0)) == {0, 1, 2, 3, 8, 9, 10, 11}
    assert store.keys_BKSD[0, 0, 4:8].abs().sum() == 0 == store.values_BKSD[0, 0, 4:8].abs().sum()
    assert store.table.state["page"][0].tolist() == [[3, 0, 3, 3], [0, 3, 3, 3]]
    assert set(held(store, 1, 0)) == set(range(12))
    assert store.table.state["page"][1].tolist() == [[3] * 4] * 2


def test_a_prompt_marks_the_pages_from_its_beginning_on_where_it_has_tokens(store):
    store.table.now_B.fill_(12)
    store.mark_prompt([6, 12])
    assert store.user_BKP[0].tolist() == [[0, 1, 1, 0]] * 2
    assert not store.user_BKP[1].any()


def test_cutting_the_end_leaves_the_rest_and_the_place_of_the_next_token(store):
    store.table.now_B.fill_(12)
    store.table.state["page"] += 3
    store.mark_prompt([0, 0])
    store.truncate([6, 12])
    assert set(held(store, 0, 1)) == set(range(6))
    assert set(held(store, 1, 1)) == set(range(12))
    assert store.tail_BK.tolist() == [[1, 1], [2, 2]]
    assert store.table.now_B.tolist() == [6, 12]
    assert store.user_BKP[0].tolist() == [[1, 1, 0, 0]] * 2
    assert store.table.state["page"][0].tolist() == [[3, 3, 0, 0]] * 2
    assert not store.table.state["token"][0, :, 6:].any()
    assert store.user_BKP[1].tolist() == [[1, 1, 1, 0]] * 2


def test_the_tail_is_empty_where_its_page_is_gone(store):
    """The page of the next token was evicted; another slot holds a token of it, but not in its place."""
    store.table.now_B.fill_(12)
    store.move(Moves(torch.tensor([5]).expand(2, 2, 1), torch.tensor([0]).expand(2, 2, 1)))
    store.table.position_BKS[:, :, 4:8] = -1
    store.truncate([6, 6])
    assert {slot: content[0] for slot, content in held(store, 0, 0).items()} == {0: 5, 1: 1, 2: 2, 3: 3}
    assert store.tail_BK.tolist() == [[1, 1], [1, 1]]


def test_slots_in_use_are_not_released(store):
    store.table.position_BKS[:, :, :4] = -1
    store.release(1)
    assert store.pages == 3
