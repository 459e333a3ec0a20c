"""The oracles themselves on examples small enough to work out by hand."""

import math

import pytest

from tests.oracle import lazy_eviction, tri_attention
from tests.oracle.base import Heads, Limit, RowOracle, Setting, exactly_representable, softmax
from tests.oracle.pages import QuestOracle, RaasOracle, RandomOracle, WindowOracle, mix
from tests.oracle.tokens import H2OOracle, StreamingOracle
from tests.oracle.vase import VaseOracle

ONE = Heads(kv=1, group=1)


def total(tokens: int) -> Setting:
    return Setting(Limit(tokens, on_top_of_prompt=False), ONE)


def feed(oracle: RowOracle, prompt: list[float], steps: list[tuple[float, float]]) -> None:
    """One head of dimension one: `prompt` holds the keys (queries are 0), `steps` pairs of query and key."""
    oracle.prefill([[[0.0] for _ in prompt]], [[[key] for key in prompt]])
    for query, key in steps:
        oracle.step([[query]], [[key]])


def test_limits_count_pages_as_the_rule_says() -> None:
    assert Limit(35, on_top_of_prompt=False).in_pages(prompt_pages=1, page_size=16) == 2
    assert Limit(35, on_top_of_prompt=True).in_pages(prompt_pages=2, page_size=16) == 2 + 3


def test_query_heads_of_a_group_are_neighbours() -> None:
    assert list(Heads(kv=2, group=3).queries_of(1)) == [3, 4, 5]


def test_softmax_and_exact_representation() -> None:
    assert softmax({3: 0.0, 7: 0.0}) == {3: 0.5, 7: 0.5}
    assert exactly_representable(0.375)
    assert not exactly_representable(1 / 3)


def test_mix_is_the_published_splitmix64() -> None:
    assert mix(0) == 0xE220A8397B1DCDAF


def test_streaming_keeps_sinks_and_window() -> None:
    oracle = StreamingOracle(total(5), sinks=2)
    feed(oracle, [0.0] * 7, [(0.0, 0.0)])
    assert oracle.residents() == [[0, 1, 5, 6, 7]]


def test_h2o_evicts_the_lightest_outside_the_window() -> None:
    oracle = H2OOracle(total(4))
    # Queries of 0 spread evenly: masses of the prompt 1+1/2+1/3+1/4, 1/2+1/3+1/4, 1/3+1/4, 1/4.
    feed(oracle, [0.0, 0.0, 0.0, 0.0], [(0.0, 0.0)])
    assert oracle.residents() == [[0, 1, 3, 4]]  # 2 and 3 are lighter than 1, but 3 is inside the window of 2


def test_h2o_trims_a_long_prompt_to_window_and_heaviest() -> None:
    oracle = H2OOracle(total(3), heavy=0.34)
    feed(oracle, [0.0] * 6, [])
    assert oracle.residents() == [[0, 4, 5]]


def test_lazy_eviction_keeps_what_was_important_again() -> None:
    assert lazy_eviction.worth(0, 1) == 2.0
    assert lazy_eviction.worth(1, 0) == 0.0
    oracle = lazy_eviction.LazyEvictionOracle(total(4), alpha=0.4, window=1)
    # Token 1 is important in step 2, and in step 3 each of four tokens receives a quarter.
    feed(oracle, [0.0], [(0.0, 9.0), (1.0, 0.0), (0.0, 0.0), (0.0, 0.0)])
    assert oracle.important[0][1] == [1, 2]
    assert oracle.residents() == [[0, 1, 3, 4]]  # 2 and 3 were never important again; the lower one goes


def test_vase_reserves_the_largest_values_and_samples_the_others() -> None:
    oracle = VaseOracle(total(7), window=1, large=0.5)
    oracle.see_values([[[0.0, 0.0]] * 4 + [[-3.0, 5.0], [1.0, 1.0], [0.0, 0.5], [0.0, 0.0]]])
    # Behind the four tokens of the prompt 4 and 5 compete in step 7; 6 and 7 are of this round and the last.
    feed(oracle, [0.0] * 4, [(0.0, 0.0)] * 4)
    assert oracle.residents() == [[0, 1, 2, 3, 4, 6, 7]]


def test_tri_attention_takes_rope_out_and_looks_from_a_distance() -> None:
    (plain,) = tri_attention.without_rope([math.cos(3.0), math.sin(3.0)], 3)
    assert abs(plain - 1) < 1e-12
    far = tri_attention.score([1 + 0j], 5, [1 + 0j], [1.5])
    assert abs(far - (math.cos(5.0) + 0.5)) < 1e-12


def test_raas_evicts_the_oldest_stamp_and_breaks_ties_downwards() -> None:
    oracle = RaasOracle(total(5), page_size=1, r=0.2)
    # Page 0 is pinned. Every step reads page 1 (r leaves one page), the others are never read again.
    feed(oracle, [0.0], [(1.0, 9.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)])
    assert oracle.residents() == [[0, 1, 3, 4, 5]]
    assert oracle.stamps[0][1] == 5


def test_raas_without_pinning_keeps_the_latest_pages_of_a_long_prompt() -> None:
    oracle = RaasOracle(total(4), page_size=2, pin_prompt=False)
    feed(oracle, [0.0] * 7, [])
    assert oracle.residents() == [[4, 5, 6]]


def test_a_page_with_one_prompt_token_stays_pinned() -> None:
    oracle = WindowOracle(total(8), page_size=4)
    feed(oracle, [0.0], [(0.0, 0.0)] * 12)
    assert oracle.residents() == [[0, 1, 2, 3, 12]]


@pytest.mark.parametrize("seed", [0, 1])
def test_random_never_evicts_a_pinned_page(seed: int) -> None:
    oracle = RandomOracle(total(5), page_size=1, seed=seed)
    feed(oracle, [0.0, 0.0], [(0.0, 0.0)] * 20)
    assert oracle.residents()[0][:2] == [0, 1]
    assert oracle.residents()[0][-1] == 21
    assert len(oracle.residents()[0]) == 5


def test_quest_reads_tail_and_best_bounds() -> None:
    oracle = QuestOracle(total(4), page_size=2)
    feed(oracle, [1.0, 1.0, 5.0, -9.0, 5.0, 2.0], [(1.0, 0.0)])
    assert oracle.residents() == [[0, 1, 2, 3, 4, 5, 6]]
    assert oracle.attended() == [[2, 3, 6]]  # pages 1 and 2 have the same bound, the lower one is read
    oracle.step([[-1.0]], [[0.0]])
    assert oracle.attended() == [[2, 3, 6, 7]]  # a negative query looks at the smallest key


def test_the_oracle_says_when_rounding_decides() -> None:
    oracle = StreamingOracle(total(5))
    assert oracle.best({0: 1 / 3, 1: 1 / 3 + 1e-15}, 1) == {1}
    assert oracle.doubtful


def test_an_exact_tie_is_no_doubt() -> None:
    oracle = StreamingOracle(total(5))
    assert oracle.best({0: 0.5, 1: 2.0, 2: 2.0, 3: 2.0}, 2) == {1, 2}
    assert oracle.best({0: 1 / 3, 1: 1 / 3}, 1, signs={0: "same", 1: "same"}) == {0}
    assert oracle.smallest({4: 3.0, 2: 1.0, 1: 1.0}) == 1
    assert not oracle.doubtful
