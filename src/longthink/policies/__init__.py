"""Policies: which page gives way. One file each; pure tensor functions over a `PageTable`."""

from longthink.policies.base import PAGE_SIZES, Moves, PageTable, Policy, Shape, Step
from longthink.policies.dense import Dense
from longthink.policies.fifo import Fifo
from longthink.policies.h2o import H2O
from longthink.policies.milestone import Milestone
from longthink.policies.quest import Quest
from longthink.policies.raas import RaaS
from longthink.policies.random import Random
from longthink.policies.recency import Recency
from longthink.policies.registry import (
    available_policies,
    get_policy_class,
    make_policy,
    policy_from_dict,
    register,
)
from longthink.policies.streaming_llm import StreamingLLM

__all__ = [
    "H2O",
    "PAGE_SIZES",
    "Dense",
    "Fifo",
    "Milestone",
    "Moves",
    "PageTable",
    "Policy",
    "Quest",
    "RaaS",
    "Random",
    "Recency",
    "Shape",
    "Step",
    "StreamingLLM",
    "available_policies",
    "get_policy_class",
    "make_policy",
    "policy_from_dict",
    "register",
]
