"""Registry, texts, JSON and validation of policies and budgets."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import longthink
from longthink import policies
from longthink.cache import LayerCache
from longthink.config import Budget
from longthink.errors import UndeclaredNeedError
from longthink.policies import Policy, grows, policy_from_dict, policy_spec, policy_to_dict, register
from longthink.policies.registry import _REGISTRY

NAMES = longthink.available_policies()


def test_the_systems_of_the_paper_and_the_controls_are_there():
    assert set(NAMES) >= {"dense", "streaming_llm", "h2o", "quest", "raas", "recency", "random", "milestone"}
    assert set(NAMES) >= {"keydiff", "lazy_eviction", "r_kv", "snapkv", "tova", "tri_attention", "vase"}


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_says_what_it_is_and_how_it_differs_from_its_paper(name):
    policy = longthink.make_policy(name)
    assert policy.name == name
    for text in policy.info:
        assert text.strip()
    assert (policy.info.memory == "O(N)") == grows(policy)
    assert "Differs from the paper" in type(policy).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_json_and_text_round_trip(name):
    policy = longthink.make_policy(name)
    assert policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == policy
    assert longthink.make_policy(policy_spec(policy)) == policy
    assert policy_spec(policy) == name


@given(
    st.builds(
        longthink.RaaS,
        r=st.floats(0, 1),
        used=st.sampled_from(["top_r", "alpha"]),
        alpha=st.floats(0, 1),
        score=st.sampled_from(["bound", "exact"]),
        sharing=st.sampled_from(["kv_head", "layer"]),
        pin_prompt=st.booleans(),
        dense_layers=st.integers(0, 100),
        page_size=st.sampled_from([1, 4, 8, 16, 32]),
    )
)
def test_raas_round_trips_with_any_switches(policy):
    assert longthink.make_policy(policy_spec(policy)) == policy
    assert policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == policy


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("snapkv:page_size=16", "page_size=16 is not one of 1"),
        ("snapkv:window=0", "window=0 is out of range: allowed is >= 1"),
        ("snapkv:kernel=4", "kernel=4 must be odd: allowed is 1, 3, 5"),
        ("snapkv:pooling=min", "pooling='min' is not one of 'avg', 'max'"),
        ("tova:sharing=row", "sharing='row' is not one of 'kv_head', 'layer'"),
        ("keydiff:recent_share=1.5", "recent_share=1.5 is out of range: allowed is 0.0 to 1.0"),
        ("r_kv:lam=-1", "lam=-1.0 is out of range: allowed is 0.0 to 1.0"),
        ("r_kv:threshold=2", "threshold=2.0 is out of range: allowed is -1.0 to 1.0"),
        ("r_kv:refresh=0", "refresh=0 is out of range: allowed is >= 1"),
    ],
)
def test_options_out_of_range_are_named(policy, message):
    with pytest.raises(ValueError, match=message):
        longthink.make_policy(policy)


def test_policies_are_frozen_and_hold_no_state():
    policy = longthink.RaaS()
    with pytest.raises(AttributeError):
        policy.r = 0.1
    assert dataclasses.replace(policy, r=0.1) == longthink.RaaS(r=0.1)


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match=r"'raas' is taken by longthink\.policies\.raas"):

        @register("raas")
        class Other(Policy):
            pass


@given(st.integers(0, 500), st.integers(1, 500), st.sampled_from([1, 4, 8, 16, 32]))
def test_budget_in_pages(prompt, tokens, page_size):
    assert Budget(budget=tokens).pages(prompt, page_size) * page_size <= tokens
    pages = Budget(decode_budget=tokens).pages(prompt, page_size)
    assert prompt + tokens <= pages * page_size < prompt + tokens + 2 * page_size


def test_public_names_are_the_declared_ones():
    for name in longthink.__all__:
        assert getattr(longthink, name) is not None
    assert dir(longthink) == sorted(longthink.__all__)
    ours = {policies.get_policy_class(name).__name__ for name in NAMES}
    assert len(set(longthink.__all__) - ours) <= 22
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        longthink.nonsense  # noqa: B018


def test_the_contract_is_small():
    assert len([name for name in dir(Policy) if name[0] != "_"]) <= 16


def test_every_registered_policy_is_exported():
    ours = {name: cls for name, cls in _REGISTRY.items() if cls.__module__.startswith("longthink.")}
    assert len(ours) >= 8
    for cls in ours.values():
        assert getattr(longthink, cls.__name__) is cls
        assert cls.__name__ in longthink.__all__
        assert getattr(policies, cls.__name__) is cls


def test_a_subclass_does_not_pass_for_its_parent():
    class Mine(longthink.RaaS):
        pass

    assert Mine.name == "Mine" and policy_spec(Mine(r=0.25)) == "Mine:r=0.25"
    assert longthink.RaaS.name == "raas"


def test_fifo_is_short_for_recency_in_pages():
    assert longthink.make_policy("fifo") == longthink.Recency(page_size=16)
    assert longthink.make_policy("fifo:page_size=4") == longthink.Recency(page_size=4)
    assert policy_from_dict({"name": "fifo", "page_size": 8}) == longthink.Recency(page_size=8)


def attend(policy: Policy) -> None:
    layer = LayerCache(policy, Budget(decode_budget=8))
    for tokens in (3, 1, 1):
        layer.attend(*torch.randn(3, 1, 1, tokens, 4))


READS = {
    "vectors": lambda table, step: (table.keys_BKSD, table.values_BKSD, step.query_BKGD),
    "key_bounds": lambda table, step: (table.kmin_BKPD, table.kmax_BKPD, step.query_BKGD),
    "weights": lambda table, step: (step.weights_BKGS,),
}


@pytest.mark.parametrize("need", READS)
def test_what_a_policy_has_not_declared_is_an_error_and_not_an_empty_tensor(need):
    class Reads(longthink.Recency):
        def observe(self, table, step):
            assert all(tensor.numel() for tensor in READS[need](table, step))

    with pytest.raises(UndeclaredNeedError, match=f'add "({need}|vectors)" to its `needs`'):
        attend(Reads())
    Reads.needs = frozenset({need})
    attend(Reads())


def test_an_unknown_need_is_refused_before_anything_runs():
    class Wants(longthink.Recency):
        needs = frozenset({"weigths"})

    with pytest.raises(ValueError, match=r"needs \['weigths'\]: allowed is weights, key_bounds"):
        attend(Wants())


def test_random_draws_anew_in_every_layer():
    policy = longthink.Random(seed=5)
    assert len({policy.for_layer(layer).seed for layer in range(40)}) == 40
    assert policy.for_layer(3) == policy.for_layer(3) != longthink.Random(seed=6).for_layer(3)
