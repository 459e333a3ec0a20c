"""The worked example of the RaaS paper: token granularity and a cache of five, stamps after every step.

The paper appends a token, stamps the used ones and then evicts one. The rule here lets the victim go before
the next token is written, so that a cache never holds more than its cap: a cache of n in the paper keeps the
same tokens as a cap of n + 1 here. With a cap of n the two part where the victim would have been read.
"""

import pytest
import torch

from longthink.cache import LayerCache
from longthink.config import Budget
from longthink.policies import RaaS
from tests.oracle.base import Heads, Limit, Setting
from tests.oracle.pages import RaasOracle

E = None
# One row per decode step, entries are the stamps of tokens 1..n, E is evicted.
PAPER = [
    [1],
    [2, 2],
    [3, 3, 3],
    [4, 3, 4, 4],
    [5, 5, 4, 5, 5],
    [6, 5, E, 5, 5, 6],
    [7, 7, E, E, 5, 7, 7],
    [8, 8, E, E, E, 8, 8, 8],
]
DIM = 10
LOUD = 8.0
ALPHA = 0.01


def key_of(token: int) -> list[float]:
    return [LOUD if column == token else 0.0 for column in range(DIM)]


def query_reading(tokens: set[int]) -> list[float]:
    return [LOUD if column in tokens else 0.0 for column in range(DIM)]


def used_at(step: int) -> set[int]:
    return {token for token, stamp in enumerate(PAPER[step - 1], start=1) if stamp == step}


def survivors_of(step: int) -> set[int]:
    return {token for token, stamp in enumerate(PAPER[step - 1], start=1) if stamp is not E}


def layer_residents(cap: int, score: str) -> list[set[int]]:
    """Tokens (counted from 1) resident after each of nine steps; nothing is asked of the ninth."""
    policy = RaaS(page_size=1, pin_prompt=False, used="alpha", alpha=ALPHA, score=score)
    layer = LayerCache(policy, Budget(budget=cap))
    history = []
    for step in range(1, 10):
        used = used_at(step) if step <= 8 else {step}
        key, query = torch.tensor(key_of(step)), torch.tensor(query_reading(used))
        layer.attend(query.view(1, 1, 1, DIM), key.view(1, 1, 1, DIM), key.view(1, 1, 1, DIM), scaling=1.0)
        history.append({position + 1 for position in layer.resident_positions()[0][0]})
    return history


@pytest.mark.parametrize("score", ["bound", "exact"])
def test_the_layer_keeps_what_the_paper_keeps(score: str) -> None:
    residents = layer_residents(6, score)
    for step in range(1, 9):
        assert residents[step] == survivors_of(step) | {step + 1}


@pytest.mark.parametrize("score", ["bound", "exact"])
def test_a_cap_of_five_lets_the_victim_go_before_it_is_read(score: str) -> None:
    residents = layer_residents(5, score)
    assert residents[4] == {1, 2, 3, 4, 5}
    assert residents[5] == survivors_of(6)
    assert residents[6] == {1, 4, 5, 6, 7}  # tokens 2, 4 and 5 tie, the lowest goes; the paper reads 2 first
    assert residents[7] == {1, 5, 6, 7, 8}


def test_the_oracle_stamps_as_the_paper_does() -> None:
    setting = Setting(Limit(6, on_top_of_prompt=False), Heads(1, 1))
    oracle = RaasOracle(setting, page_size=1, pin_prompt=False, used="alpha", alpha=ALPHA)
    oracle.prefill([[query_reading({1})]], [[key_of(1)]])
    for step in range(2, 9):
        oracle.step([query_reading(used_at(step))], [key_of(step)])
        for token in survivors_of(step):
            assert oracle.stamps[0][token - 1] == PAPER[step - 1][token - 1] - 1
    assert not oracle.doubtful
