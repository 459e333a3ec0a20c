"""Policies that rank single tokens: examples worked out by hand, formulas in matrix form, budgets that are tiny."""

import pytest
import torch

from longthink.cache import LayerCache
from longthink.config import Budget
from longthink.policies import make_policy
from longthink.policies.tokens import pool_neighbours
from tests.oracle.base import Heads, Limit, Setting
from tests.oracle.single_tokens import KeyDiffOracle, RKVOracle, SnapKVOracle, TovaOracle

ONE = Heads(kv=1, group=1)
SPECS = ("keydiff", "r_kv", "snapkv", "tova", "keydiff:pin_prompt=false", "snapkv:pin_prompt=false")


def total(tokens):
    return Setting(Limit(tokens, on_top_of_prompt=False), ONE)


def feed(oracle, prompt, steps):
    """One head: keys of the prompt, whose queries are 0, and pairs of query and key."""
    oracle.prefill([[[0.0] * len(prompt[0]) for _ in prompt]], [prompt])
    for query, key in steps:
        oracle.step([query], [key])
    return oracle.residents()[0]


def decoded(spec, tokens, *, budget, prompt=5, heads=4, kv_heads=2, dim=8):
    """A layer after so many decode steps, with the queries of all of them (BHQD)."""
    made = torch.Generator().manual_seed(7)
    layer = LayerCache(make_policy(spec), Budget(budget=budget))
    query = torch.randn(2, heads, prompt + tokens, dim, generator=made, dtype=torch.float64)
    key = torch.randn(2, kv_heads, prompt + tokens, dim, generator=made, dtype=torch.float64)
    layer.attend(query[:, :, :prompt], key[:, :, :prompt], key[:, :, :prompt])
    for i in range(prompt, prompt + tokens):
        layer.attend(query[:, :, i : i + 1], key[:, :, i : i + 1], key[:, :, i : i + 1])
    return layer, query


def test_tova_evicts_what_the_last_query_reads_least() -> None:
    # The query of token 3 is 1: it reads most of key 9 and least of key 0, the newest one.
    steps = [([0.0], [1.0]), ([0.0], [9.0]), ([1.0], [0.0]), ([0.0], [1.0])]
    assert feed(TovaOracle(total(4)), [[5.0]], steps) == [0, 1, 2, 4]


def snapkv_keeps(last_query: float, **options: object) -> list[int]:
    """Keys of the tokens 1 to 3 are 1, 0 and 3, all others 0; the query of token 4 is 1, and then `last_query`."""
    keys, queries = [1.0, 0.0, 3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, last_query, 0.0]
    steps = [([query], [key]) for query, key in zip(queries, keys, strict=True)]
    return feed(SnapKVOracle(total(6), **options), [[0.0]], steps)


def test_snapkv_lends_votes_to_neighbours() -> None:
    assert snapkv_keeps(1.0, window=2, kernel=1) == [0, 1, 3, 4, 5, 6]
    assert snapkv_keeps(1.0, window=2, kernel=3, pooling="max") == [0, 2, 3, 4, 5, 6]  # 2 is beside 3


def test_snapkv_forgets_votes_after_the_window() -> None:
    assert snapkv_keeps(-1.0, window=2, kernel=1) == [0, 2, 3, 4, 5, 6]
    assert snapkv_keeps(-1.0, window=1, kernel=1) == [0, 1, 2, 4, 5, 6]


def test_keydiff_evicts_the_key_nearest_to_the_mean() -> None:
    right, up = [1.0, 0.0], [0.0, 1.0]
    steps = [(right, right), (right, up), (right, right), (right, up), (right, right)]
    oracle = KeyDiffOracle(total(4), recent_share=0.0)
    # Three keys point right, so the oldest of them that is not of the prompt goes; then the tie of two and two.
    assert feed(oracle, [right], steps[:4]) == [0, 2, 3, 4]
    oracle.step([right], [right])
    assert oracle.residents() == [[0, 3, 4, 5]]


def test_r_kv_keeps_the_latest_of_similar_keys() -> None:
    right, up = [1.0, 0.0], [0.0, 1.0]
    oracle = RKVOracle(total(5), window=1, lam=0.0, refresh=8)
    # 1, 2 and 3 say the same; 1 and 2 are the older ones, and the lower position goes.
    steps = [(up, right), (up, right), (up, right), (up, [-1.0, 0.0]), (up, up)]
    assert feed(oracle, [up], steps) == [0, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("max", [5.0, 5.0, 0.0, 4.0, 5.0, 0.0]), ("avg", [8 / 3, 3.5, 0.0, 2.5, 10 / 3, 0.0])],
)
def test_neighbours_are_those_in_order_of_position(pooling: str, expected: list[float]) -> None:
    # By position: 2, 5, 1, 4 for the tokens at 3, 7, 8, 20; the slot of position 30 is no candidate, one is empty.
    position = torch.tensor([[[7, 3, -1, 20, 8, 30]]], dtype=torch.int32)
    value = torch.tensor([5.0, 2.0, 9.0, 4.0, 1.0, 9.0]).view(1, 1, 6, 1)
    candidate = torch.tensor([[[True, True, False, True, True, False]]])
    found = pool_neighbours(value, candidate, position, 3, pooling).flatten().tolist()
    assert found == pytest.approx(expected)


def test_likeness_is_the_column_mean_of_the_cosines_without_the_links_to_the_latest() -> None:
    """In the matrix form of the authors' code, when every slot is visited in every step."""
    layer, _ = decoded("r_kv:refresh=64:threshold=0.2", 40, budget=24)
    table = layer.store.table
    for row in range(2):
        for head in range(2):
            by_position = table.position_BKS[row, head].argsort()
            unit = torch.nn.functional.normalize(layer.store.keys_BKSD[row, head, by_position], dim=-1)
            cosine = (unit @ unit.T).fill_diagonal_(0)
            similar = (cosine > 0.2).nonzero()
            latest = {int(i): int(j) for i, j in similar}  # the last one of each row stays
            for i, j in latest.items():
                cosine[i, j] = 0
            found = table.state["likeness"][row, head, by_position].double()
            torch.testing.assert_close(found, cosine.mean(0), atol=1e-6, rtol=1e-6)
            assert latest


def test_importance_is_the_softmax_of_the_largest_logit_of_the_group() -> None:
    layer, query = decoded("r_kv:window=4:kernel=1:lam=1.0", 30, budget=64)
    table, keys = layer.store.table, layer.store.keys_BKSD
    old = 35 - 4
    logits = query[:, :, -4:].unflatten(1, (2, 2)) @ keys[:, :, None, :old].transpose(-1, -2) * 8**-0.5
    wanted = logits.amax(2).softmax(-1).mean(2)
    torch.testing.assert_close(layer.policy.worth(table)[:, :, :old].double(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("budget", [17, 24, 32])
def test_r_kv_visits_every_slot_within_the_time_it_promises(budget: int) -> None:
    layer, _ = decoded("r_kv:refresh=2", 60, budget=budget)
    likeness = layer.store.table.state["likeness"]
    likeness.fill_(torch.nan)
    query = torch.zeros(2, 4, 1, 8, dtype=torch.float64)
    for i in range(budget):  # 2 L / refresh
        key = torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        layer.attend(query, key, key)
    assert likeness.isfinite().all()


def test_r_kv_forgets_that_dropped_tokens_were_similar() -> None:
    layer, query = decoded("r_kv:refresh=1:threshold=0.2", 30, budget=24)
    layer.rewind([30, 30])
    table = layer.store.table
    assert int(table.state["similar"].max()) > 31
    layer.attend(query[:, :, :1], query[:, :2, :1], query[:, :2, :1])
    assert int(table.state["similar"].max()) <= 31


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_tiny_budgets_hold(spec: str, slots: int) -> None:
    pinned = make_policy(spec).pins_prompt()
    layer, _ = decoded(spec, 12, budget=slots + 5 * pinned)
    for row in layer.resident_positions():
        for kept in row:
            assert len(kept) == slots + 5 * pinned
            assert kept[-1] == 16
            assert not pinned or kept[:5] == [0, 1, 2, 3, 4]
