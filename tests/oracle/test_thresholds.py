"""Ties and thresholds worked out by hand and run through the layer: one head, page size 1, position 0 pinned."""

import pytest
import torch

from longthink.cache import LayerCache
from longthink.config import Budget
from longthink.policies import H2O, Policy, Quest, RaaS

DIM = 8
LOUD = 32.0


def unit(*columns: int) -> torch.Tensor:
    vector = torch.zeros(1, 1, 1, DIM, dtype=torch.float64)
    vector[..., list(columns)] = LOUD
    return vector


def residents_after(policy: Policy, cap: int, reads: list[tuple[int, ...]]) -> list[int]:
    """Token i has a key of its own; step i reads the tokens `reads[i]`, in equal shares."""
    layer = LayerCache(policy, Budget(budget=cap))
    for token, columns in enumerate(reads):
        layer.attend(unit(*columns), unit(token), unit(token), scaling=1.0)
    return layer.resident_positions()[0][0]


@pytest.mark.parametrize("score", ["bound", "exact"])
def test_a_share_equal_to_alpha_is_not_used(score: str) -> None:
    policy = RaaS(page_size=1, used="alpha", alpha=0.5, score=score)
    # Step 3 reads tokens 0 and 1, half each: 1 keeps its old stamp and goes first.
    assert residents_after(policy, 4, [(0,), (1,), (2,), (0, 1), (4,)]) == [0, 2, 3, 4]


@pytest.mark.parametrize("score", ["bound", "exact"])
def test_a_share_above_alpha_is_used(score: str) -> None:
    policy = RaaS(page_size=1, used="alpha", alpha=0.4375, score=score)
    assert residents_after(policy, 4, [(0,), (1,), (2,), (0, 1), (4,)]) == [0, 1, 3, 4]


@pytest.mark.parametrize("score", ["bound", "exact"])
def test_equal_scores_use_the_lower_page(score: str) -> None:
    policy = RaaS(page_size=1, r=0.25, score=score)
    # Step 3 reads 1 and 2 alike and one page of four counts: 1 is stamped, 2 goes.
    assert residents_after(policy, 4, [(0,), (1,), (2,), (1, 2), (4,)]) == [0, 1, 3, 4]


def test_equal_stamps_evict_the_lower_page() -> None:
    policy = RaaS(page_size=1, r=1.0)
    assert residents_after(policy, 4, [(0,), (1,), (2,), (3,), (4,)]) == [0, 2, 3, 4]


def test_the_tail_counts_as_used_even_when_nobody_reads_it() -> None:
    policy = RaaS(page_size=1, r=0.25, pin_prompt=False)
    # Token 3 is written at step 3, which reads token 1 only; with stamp 3 it outlives 0 and 2.
    assert residents_after(policy, 4, [(0,), (1,), (2,), (1,), (1,), (1,)]) == [1, 3, 4, 5]


@pytest.mark.parametrize(("reads", "output"), [((1, 2), 1), ((2, 0), 0)])
def test_quest_reads_the_lower_of_two_equal_pages(reads: tuple[int, ...], output: int) -> None:
    layer = LayerCache(Quest(page_size=1), Budget(budget=2))
    for token in range(3):
        layer.attend(unit(token), unit(token), unit(token), scaling=1.0)
    out = layer.attend(unit(*reads), unit(3), unit(3), scaling=1.0)
    torch.testing.assert_close(out, unit(output))


def test_empty_slots_take_no_share_of_the_scores() -> None:
    layer = LayerCache(RaaS(page_size=1, used="alpha", alpha=0.3), Budget(budget=5))
    # At step 3 four of five slots are filled; 0, 1 and 3 have a third of the share each and 2 has none.
    queries = [unit(0), unit(1), unit(2), -unit(2), unit(4), unit(5)]
    for token, query in enumerate(queries):
        layer.attend(query, unit(token), unit(token), scaling=1.0)
    assert layer.resident_positions()[0][0] == [0, 1, 3, 4, 5]


def test_of_equally_light_prompt_tokens_the_later_ones_stay() -> None:
    layer = LayerCache(H2O(), Budget(budget=6))
    keys = torch.cat([unit(token % (DIM - 1) + 1) if token else unit(0) for token in range(12)], dim=2)
    layer.attend(unit(0).expand(keys.shape), keys, keys, scaling=1.0)
    # All attention is on token 0. The window is 9 to 11; of the others, all without mass, 7 and 8 stay.
    assert layer.resident_positions()[0][0] == [0, 7, 8, 9, 10, 11]
