"""Facts about caches whose pages are packed: bounds, rewinding, rows, worth of a page, growing."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from longthink.cache import TieredCache, with_pages
from longthink.cache.forward import fast_forward
from longthink.config import Budget, KvBits
from longthink.errors import UnsupportedFeatureError
from longthink.policies import Recency, make_policy
from longthink.policies.keepers import KeeperPages
from tests.examples import few

DIM, HEADS = 8, 2
BITS = KvBits(keys=4, values=3, window=32, page=16)


def tiered(policy="raas", bits=BITS, rows=(40,), steps=0, seed=0, **budget):
    policy = with_pages(make_policy(policy), bits)
    bound = Budget(**(budget or {"decode_budget": 64})) if policy.bounds != "nothing" else None
    layer = TieredCache(policy, bound, kv_bits=bits, head_dim=DIM, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    width = max(rows)
    real = torch.arange(width) >= width - torch.tensor(rows)[:, None]
    layer.attend(*columns(len(rows), width, generator), real)
    run(layer, steps, generator)
    return layer, generator


def columns(rows, width, generator):
    return [torch.randn(rows, heads, width, DIM, generator=generator) for heads in (2 * HEADS, HEADS, HEADS)]


def run(layer, steps, generator):
    return [layer.attend(*columns(len(layer.rows.lengths), 1, generator)) for _ in range(steps)]


def keys_as_read(layer):
    """Keys and values that attention reads, and the position of each, BKS."""
    store = layer.tiers
    slots = torch.arange(store.pages).expand(*store.table.page_BKP.shape[:2], -1)
    keys, values, resident = store.read(slots)
    return keys, values, torch.where(resident, store.table.position_BKS, -1)


def by_position(layer, row=0, head=0):
    keys, values, position = keys_as_read(layer)
    held = position[row, head] >= 0
    order = position[row, head][held].argsort()
    return (
        position[row, head][held][order].tolist(),
        keys[row, head][held][order],
        values[row, head][held][order],
    )


@pytest.mark.slow
@few(15)
@given(st.integers(0, 260), st.sampled_from(["raas", "quest"]), st.sampled_from(["full", "packed"]))
def test_key_bounds_are_those_of_the_keys_as_they_are_read(steps, policy, prompt):
    bits = KvBits(keys=2, values=2, window=32, page=16, prompt=prompt)
    layer, _ = tiered(policy, bits, rows=(70, 9), steps=steps, decode_budget=96)
    keys, _, position = keys_as_read(layer)
    resident = (position >= 0).unflatten(-1, (-1, 16))
    pages = keys.unflatten(2, (-1, 16))
    low = torch.where(resident[..., None], pages, torch.inf).amin(-2)
    high = torch.where(resident[..., None], pages, -torch.inf).amax(-2)
    held = resident.any(-1)
    store = layer.tiers
    torch.testing.assert_close(store.kmin_BKPD[held], low[held])
    torch.testing.assert_close(store.kmax_BKPD[held], high[held])


@pytest.mark.parametrize("cut", [0, 1, 5, 16, 17, 33, 60])
def test_a_text_that_is_cut_goes_on_where_it_was_cut(cut):
    """Also where the page of the next token has been packed: then it is unpacked."""
    layer, generator = tiered(
        "recency", bits=KvBits(keys=8, values=8, window=16, page=16), steps=90, decode_budget=96
    )
    length = 130 - cut
    positions, keys, values = by_position(layer)
    layer.rewind([length])
    kept, read_k, read_v = by_position(layer)
    assert kept == [position for position in positions if position < length]
    assert torch.equal(read_k, keys[: len(kept)])
    assert torch.equal(read_v, values[: len(kept)])
    run(layer, 1, generator)
    tail = int(layer.tiers.tail_BK[0, 0])
    assert tail < layer.tiers.full_pages
    assert int(layer.tiers.table.page_BKP[0, 0, tail]) == length // 16
    run(layer, 70, generator)
    held = by_position(layer)[0]
    assert held == sorted(set(held))
    assert held[-40:] == list(range(length + 71 - 40, length + 71))


def test_rows_move_with_their_packed_pages():
    one, _ = tiered(rows=(40,), steps=90, seed=1)
    other, generator = tiered(rows=(90, 20), steps=60, seed=2)
    expected = by_position(one, head=1)
    other.adopt(1, one)
    assert other.rows.lengths == [150, 130]
    found = by_position(other, row=1, head=1)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    kept = by_position(other, row=0)
    other.select_rows(torch.tensor([1, 0, 1]))
    for row, before in ((0, expected), (2, expected)):
        assert torch.equal(by_position(other, row=row, head=1)[2], before[2])
    assert torch.equal(by_position(other, row=1)[1], kept[1])
    run(other, 40, generator)
    other.select_rows(torch.tensor([2]))
    other.release()
    assert other.tiers.full_pages == 3 + 2
    run(other, 40, generator)
    alone = other.rows.only(0)
    assert alone.needed == (other.tiers.full_pages, other.tiers.packed_pages)


def test_a_row_alone_is_taken_whole():
    layer, generator = tiered(rows=(40, 90), steps=70)
    alone, _ = tiered(rows=(1,))
    expected = by_position(layer, row=1)
    alone.take_row(1, layer)
    found = by_position(alone)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    run(alone, 40, generator)


@pytest.mark.parametrize("policy", ["dense", "quest"])
def test_a_cache_that_grows_keeps_everything(policy):
    layer, _ = tiered(policy, rows=(90, 5), steps=300, decode_budget=48)
    for row, length in enumerate(layer.rows.lengths):
        assert layer.resident_positions()[row] == [list(range(length))] * HEADS
    assert layer.kv_bytes < layer.dense_kv_bytes


@dataclass(frozen=True, kw_only=True)
class ByPosition(KeeperPages):
    """Young tokens are worth nothing, and so is every second one."""

    @override
    def scores(self, table):
        return table.position_BKS.float() * (table.position_BKS % 2)


def test_a_page_is_worth_the_mean_of_its_tokens():
    layer, _ = tiered(ByPosition(), steps=60)
    table = layer.tiers.table
    worth = layer.policy.page_worth(table)
    for slot, page in enumerate(table.page_BKP[0, 0].tolist()):
        if page >= 0:
            tokens = [p for p in table.position_BKS[0, 0].tolist() if p // 16 == page and p >= 0]
            expected = sum(p * (p % 2) for p in tokens) / len(tokens)
            assert worth[0, 0, slot].item() == pytest.approx(expected)


@dataclass(frozen=True, kw_only=True)
class Careful(Recency):
    """Protects more recent pages than the window holds: all that are not of the prompt."""

    page_size: int = 16

    @override
    def protected(self, table):
        return table.page_BKP >= 0


def test_where_all_is_protected_the_page_of_least_worth_goes():
    layer, _ = tiered(Careful(), steps=200)
    held = layer.resident_positions()[0][0]
    assert len(held) == len(set(held))
    assert held[-1] == 239
    assert layer.num_evicted > 0


def test_statistics_count_packed_bytes():
    layer, _ = tiered(rows=(40,), steps=200)
    store = layer.tiers
    page = 16 * 8 * 7 // 8 + 4 * 8 + 4 * 16
    in_full, order = 5 * 16 * 2 * 8 * 4, 2 * 8
    assert layer.kv_bytes == HEADS * (in_full + store.packed_pages * page + order)
    full = (store.table.position_BKS[0, 0, : 5 * 16] >= 0).sum()
    held = int(full) * 2 * 8 * 4 + store.packed_pages * page + order
    assert layer.row_held_kv_bytes(0) == HEADS * held
    tensors = sum(tensor.nbytes for tensor in store.tensors())
    assert layer.metadata_bytes == tensors - layer.kv_bytes


def test_fast_forward_advances_a_bounded_cache_and_refuses_one_that_grows():
    layer, generator = tiered(rows=(40,), steps=10)
    held = layer.kv_bytes
    fast_forward(layer, 500, heads=2 * HEADS, generator=generator)
    assert layer.rows.lengths == [550]
    assert layer.kv_bytes == held
    assert layer.resident_positions()[0][0][-1] == 549
    run(layer, 40, generator)
    growing, generator = tiered("dense", rows=(40,), steps=10)
    with pytest.raises(UnsupportedFeatureError, match="'dense' is at few bits in a cache that grows"):
        fast_forward(growing, 500, heads=2 * HEADS, generator=generator)


@dataclass(frozen=True, kw_only=True)
class Remembers(Recency):
    """Writes down what stands in each slot, once."""

    page_size: int = 16

    @override
    def init_state(self, shape, device):
        tokens = torch.zeros(shape.B, shape.K, shape.P * shape.T, dtype=torch.int64)
        return {"token": tokens, "page": torch.zeros(shape.B, shape.K, shape.P, 3)}

    @override
    def admit(self, table, mass):
        self.observe(table, None)

    @override
    def observe(self, table, step):
        now_B11 = table.now_B[:, None, None] - int(step is None)
        fresh_BKS = (table.position_BKS == now_B11) | (table.position_BKS >= 0) & (step is None)
        table.state["token"].copy_(torch.where(fresh_BKS, table.position_BKS.long(), table.state["token"]))
        fresh_BKP = fresh_BKS.unflatten(-1, (-1, 16)).any(-1)
        table.state["page"].copy_(
            torch.where(fresh_BKP[..., None], table.page_BKP[..., None].float(), table.state["page"])
        )


@pytest.mark.parametrize("prompt", ["full", "packed"])
def test_the_state_of_a_page_goes_where_the_page_goes(prompt):
    bits = KvBits(keys=4, values=3, window=32, page=16, prompt=prompt)
    layer, _ = tiered(Remembers(), bits, rows=(70, 9), steps=500, decode_budget=96)
    table = layer.tiers.table
    held = table.position_BKS >= 0
    assert torch.equal(table.state["token"][held], table.position_BKS[held].long())
    held = table.page_BKP >= 0
    assert torch.equal(table.state["page"][..., 2][held], table.page_BKP[held].float())
    assert layer.num_evicted > 0
