"""Replay against real decoding, against counts by hand, and against every choice there is."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longthink.config import Budget
from longthink.errors import TraceError
from longthink.hf import make_cache
from longthink.lab.analyze.clairvoyant import optimal_recall
from longthink.lab.analyze.replays import BELADY, OPTIMUM, Replay, means
from longthink.lab.analyze.rules import Rules
from longthink.lab.analyze.whatif import what_if
from longthink.policies import make_policy, needs_budget
from tests.analyze.making import dense, recorded, written
from tests.grids import slow_but
from tests.models import build

BUDGET = 20
# What these keep does not depend on the attention of deeper layers, so decoding and replay must agree in all layers.
BLIND = ("recency", "fifo:page_size=4", "random:page_size=4", "streaming_llm:positions=logical")
# These learn from weights or vectors; in the first layer those are the same whatever the cache forgets.
LEARNING = (
    "h2o",
    "h2o:pin_prompt=True",
    "raas:page_size=4",
    "raas:page_size=4:score=exact:sharing=layer",
    "raas:page_size=4:score=exact:used=alpha:alpha=0.05",
    "raas:page_size=4:dense_layers=1",
    "milestone:page_size=4:alpha=0.1",
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    (found,) = recorded(tmp_path_factory.mktemp("whole") / "t", vectors=True, new=40).traces()
    return found


def decoded_recall(trace, spec, budget):
    """Dense attention on what a real cache holds when it is fed the same text, M x T; and when each token left it."""
    model, header, kept = build("qwen2"), trace.header, []
    attention_MTN = dense(trace)
    gone = np.full((header.layers, header.kv_heads, header.pages), -1)
    with make_cache(model, policy=spec, budget=budget) as cache, torch.no_grad():
        ids = torch.tensor([header.token_ids])
        model(ids[:, : header.prompt_tokens], past_key_values=cache)
        for t, now in enumerate(header.steps):
            model(ids[:, now : now + 1], past_key_values=cache)
            row = []
            for layer in range(header.layers):
                for head, held in enumerate(cache.resident_positions(layer)[0]):
                    out = [p for p in range(now + 1) if p not in held and gone[layer, head, p] < 0]
                    gone[layer, head, out] = now
                    row += [attention_MTN[layer * 4 + head * 2 + g, t, held].sum() for g in (0, 1)]
            kept.append(row)
    return np.array(kept).T, gone


@pytest.mark.parametrize("spec", slow_but([*BLIND, *LEARNING], BLIND[0], LEARNING[0]))
def test_replay_keeps_what_decoding_keeps(trace, spec):
    wanted_MT, gone = decoded_recall(trace, spec, BUDGET)
    (found,) = what_if(trace, [make_policy(spec)], [Budget(budget=BUDGET)], clairvoyant=False)
    layers = slice(None) if spec in BLIND else slice(0, 1)
    heads = slice(None) if spec in BLIND else slice(0, 4)
    np.testing.assert_allclose(found.maps_M[heads], wanted_MT.mean(1)[heads], atol=3e-3)
    np.testing.assert_array_equal(
        np.broadcast_to(found.gone_LKN, gone.shape)[layers], gone[layers], err_msg=spec
    )
    if spec in BLIND:
        np.testing.assert_allclose(found.curve_T, wanted_MT.mean(0), atol=3e-3)
        assert found.recall == pytest.approx(wanted_MT.mean(), abs=2e-3)
        assert found.worst == pytest.approx(wanted_MT.mean(1).min(), abs=2e-3)


def test_quest_reads_the_pages_that_decoding_reads(trace):
    (found,) = what_if(trace, [make_policy("quest:page_size=4")], [Budget(budget=12)], clairvoyant=False)
    header, attention_MTN, prompt = trace.header, dense(trace), trace.prompt()
    keys = prompt.key.reshape(2, 2, header.prompt_tokens, -1)
    recall = []
    for t, step in enumerate(trace.steps()):
        keys = np.concatenate([keys, step.key[:, :, None]], 2)
        for layer in range(2):
            for head in range(2):
                pages = [keys[layer, head, p : p + 4] for p in range(0, keys.shape[2], 4)]
                query = step.query[layer].reshape(2, 2, -1)[head]
                bound = [
                    max(np.maximum(q * page.min(0), q * page.max(0)).sum() for q in query) for page in pages
                ]
                bound[-1] = np.inf
                read = sorted(range(len(pages)), key=lambda p: (-bound[p], p))[:3]
                columns = [n for p in read for n in range(4 * p, min(4 * p + 4, keys.shape[2]))]
                recall += [attention_MTN[layer * 4 + head * 2 + g, t, columns].sum() for g in (0, 1)]
    assert found.recall == pytest.approx(np.mean(recall), abs=2e-3)
    assert (found.evictions, found.regrets) == (0, 0)


def test_budgets_side_by_side_are_those_one_by_one(trace):
    policies = [
        make_policy(spec) for spec in ("h2o:pin_prompt=True", "raas:page_size=4:score=exact", "dense")
    ]
    budgets = [Budget(budget=16), Budget(decode_budget=12), Budget(budget=28), Budget(budget=8)]
    together = what_if(trace, policies, budgets)
    alone = [
        one
        for policy in policies
        for budget in (budgets if needs_budget(policy) else budgets[:1])
        for one in what_if(trace, [policy], [budget], clairvoyant=False)
    ]
    for one, other in zip(together, alone, strict=False):
        assert (one.policy, one.budget, one.note) == (other.policy, other.budget, other.note)
        np.testing.assert_array_equal(one.gone_LKN, other.gone_LKN)
        np.testing.assert_allclose(one.curve_T, other.curve_T, atol=1e-6)
    assert [one.policy for one in together[len(alone) :]] == [BELADY] * 4 + [OPTIMUM] * 4
    assert together[3].note == "no room for a prompt of 9 tokens" and np.isnan(together[3].recall)
    assert together[8].recall == pytest.approx(1, abs=1e-5)


def test_what_a_trace_cannot_say_is_refused(tmp_path):
    (plain,) = recorded(tmp_path / "a", new=6).traces()
    (paged,) = recorded(tmp_path / "b", new=6, page_size=16).traces()
    for spec in ("milestone", "quest", "raas"):
        with pytest.raises(TraceError, match=f"'{spec}'.*--with-vectors"):
            what_if(plain, [make_policy(spec)], [Budget(budget=64)])
    with pytest.raises(
        TraceError, match="'tri_attention' needs the queries of the prompt, which no trace holds"
    ):
        what_if(plain, [make_policy("tri_attention")], [Budget(budget=64)])
    with pytest.raises(TraceError, match=r"pages of 1 tokens.*--page-size 1"):
        what_if(paged, [make_policy("recency")], [Budget(budget=64)])


def test_a_trace_of_pages_replays_policies_of_whole_pages(tmp_path, trace):
    """Page masses are all that exact RaaS looks at, so the coarse trace gives what the fine one gives."""
    (paged,) = recorded(tmp_path / "b", new=40, page_size=2).traces()
    policies = [make_policy(spec) for spec in ("raas:page_size=4:score=exact", "fifo:page_size=4")]
    coarse = what_if(paged, policies, [Budget(budget=BUDGET)], clairvoyant=False)
    fine = what_if(trace, policies, [Budget(budget=BUDGET)], clairvoyant=False)
    for one, other in zip(coarse, fine, strict=True):
        assert one.recall == pytest.approx(other.recall, abs=2e-3)
        np.testing.assert_array_equal(one.gone_LKN, other.gone_LKN[..., ::2])


def test_lookups_and_regrets_by_hand(tmp_path):
    """One head, a prompt of two tokens: token 2 is used in step 5 and in step 9, everything else reads itself."""
    attention = np.zeros((1, 1, 9, 11))
    for t, now in enumerate(range(2, 11)):
        attention[0, 0, t, 2 if now in (5, 9) else now] = 1
    made = written(tmp_path / "m.parquet", attention, 2)
    rules = Rules(local=1)
    budgets = [Budget(budget=4), Budget(budget=8), Budget(budget=10)]
    recency, more, most = what_if(made, [make_policy("recency")], budgets, rules=rules, clairvoyant=False)
    assert (recency.recall, recency.lookups) == (pytest.approx(7 / 9), 0.0)
    assert (recency.evictions, recency.regrets) == (7, 1)
    assert recency.gone_LKN[0, 0].tolist() == [-1, -1, 4, 5, 6, 7, 8, 9, 10, -1, -1]
    assert (more.lookups, more.evictions, more.regrets) == (0.5, 3, 1)
    assert (most.lookups, most.regrets) == (1.0, 0)
    assert recency.curve_T.tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 1]


def sparse_attention(seed, steps=9, prompt=3):
    rng = np.random.default_rng(seed)
    attention = rng.random((1, 2, steps, prompt + steps)) ** 6
    for t in range(steps):
        attention[:, :, t, prompt + t + 1 :] = 0
    return attention / attention.sum(-1, keepdims=True)


def best_by_trying(attention_TN, prompt, slots):
    """Least attention lost over all ways to send tokens away."""
    steps = len(attention_TN)

    def lost(held, t):
        if t == steps:
            return 0.0
        new = prompt + t
        ways = [held] if len(held) < slots else [held - {p} for p in held]
        return min(
            1 - sum(attention_TN[t, p] for p in kept | {new}) + lost(kept | {new}, t + 1) for kept in ways
        )

    starts = combinations(range(prompt), min(prompt, slots))
    return min(lost(frozenset(start), 0) for start in starts)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 6))
def test_the_optimum_is_the_best_of_all_ways(tmp_path_factory, seed, slots):
    attention = sparse_attention(seed, steps=6)
    path = tmp_path_factory.mktemp("o") / "m.parquet"
    made = written(path, attention, 3, kv_heads=1)
    *_, optimum = what_if(made, [], [Budget(budget=slots)])
    mean_TN = attention[0].mean(0)
    assert optimum.policy == OPTIMUM
    assert 6 * (1 - optimum.recall) == pytest.approx(best_by_trying(mean_TN, 3, slots), abs=2e-2)
    assert optimum.curve_T.mean() == pytest.approx(optimum.recall, abs=1e-5)
    held = (optimum.gone_LKN < 0).sum()
    assert held == min(slots, 9)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), slots=st.integers(5, 12))
def test_nobody_beats_the_optimum_and_belady_regrets_least(tmp_path_factory, seed, slots):
    made = written(tmp_path_factory.mktemp("o") / "m.parquet", sparse_attention(seed, 20, 4), 4, kv_heads=1)
    policies = [make_policy(s) for s in ("recency", "h2o", "streaming_llm:sinks=1", "random:page_size=1")]
    *found, belady, optimum = what_if(made, policies, [Budget(budget=slots)], rules=Rules(use=0.2))
    assert (belady.policy, optimum.policy) == (BELADY, OPTIMUM)
    for one in [*found, belady]:
        assert one.recall <= optimum.recall + 1e-4, one.policy
    if belady.regrets == 0:
        return
    assert min(one.regrets for one in found) > 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 6))
def test_belady_sends_away_what_is_used_last(tmp_path_factory, seed, slots):
    use, prompt = 0.3, 3
    attention = sparse_attention(seed, 12, prompt)
    made = written(tmp_path_factory.mktemp("o") / "m.parquet", attention, prompt, kv_heads=1)
    belady, _ = what_if(made, [], [Budget(budget=slots)], rules=Rules(use=use))
    used = dense(made).max(0) > use

    def next_use(page, now):
        later = [t for t in range(now - prompt, 12) if used[t, page]]
        return later[0] if later else 99

    held = sorted(range(prompt), key=lambda p: (next_use(p, prompt), -p))[:slots]
    gone = {p: prompt for p in range(prompt) if p not in held}
    for now in range(prompt, prompt + 12):
        if len(held) == slots:
            victim = min(held, key=lambda p: (-next_use(p, now), p))
            held.remove(victim)
            gone[victim] = now
        held.append(now)
    assert belady.gone_LKN[0, 0].tolist() == [gone.get(p, -1) for p in range(prompt + 12)]


def test_optimal_choice_prefers_the_cheap_victim():
    lost = np.array([[5.0, 1, 9, 9], [5, 1, 9, 9], [5, 1, 9, 9], [2, 1, 0.5, 9]])
    cost, victims = optimal_recall(lost, 1, 2)
    assert victims.tolist() == [-1, -1, 1, 2] and cost == 1.5


def test_means_leave_out_what_had_no_room():
    def outcome(problem, recall, note=""):
        return Replay(task="t", problem=problem, policy="recency", budget=64, decode_budget=None, recall=recall,
                       worst=recall / 2, lookups=1.0, evictions=4, regrets=2, note=note)  # fmt: skip

    (found,) = means([outcome("a", 0.8), outcome("b", 0.6), outcome("c", float("nan"), "no room")])
    assert (found.problems, found.no_room) == (2, 1)
    assert found.recall == pytest.approx(0.7) and found.worst == pytest.approx(0.35)
    (none,) = means([outcome("c", float("nan"), "no room")])
    assert (none.problems, none.recall, none.regrets) == (0, None, None)
