"""Policies: which page to evict when the slots are full. One file each, pure tensor functions over a `PageTable`."""

from longthink.policies.base import (
    NEEDS,
    PAGE_SIZES,
    Calibrated,
    Moves,
    PageTable,
    Policy,
    PolicyInfo,
    RanksPages,
    SavesTokens,
    SelectsPages,
    Shape,
    SharesTable,
    ShiftsKeys,
    Step,
    TrimsPrompt,
    grows,
    needs_budget,
    reads_vectors,
)
from longthink.policies.dense import Dense
from longthink.policies.h2o import H2O
from longthink.policies.keydiff import KeyDiff
from longthink.policies.lazy_eviction import LazyEviction
from longthink.policies.milestone import Milestone
from longthink.policies.quest import Quest
from longthink.policies.r_kv import RKV
from longthink.policies.raas import RaaS
from longthink.policies.random import Random
from longthink.policies.recall import Recall
from longthink.policies.recency import Recency
from longthink.policies.registry import (
    available_policies,
    get_policy_class,
    make_policy,
    page_tables,
    policy_budget,
    policy_from_dict,
    policy_spec,
    policy_to_dict,
    register,
    with_page_size,
)
from longthink.policies.snapkv import SnapKV
from longthink.policies.streaming_llm import StreamingLLM
from longthink.policies.tokens import TokenPolicy
from longthink.policies.tova import TOVA
from longthink.policies.tri_attention import TriAttention
from longthink.policies.vase import VaSE

__all__ = [
    "H2O",
    "NEEDS",
    "PAGE_SIZES",
    "RKV",
    "TOVA",
    "Calibrated",
    "Dense",
    "KeyDiff",
    "LazyEviction",
    "Milestone",
    "Moves",
    "PageTable",
    "Policy",
    "PolicyInfo",
    "Quest",
    "RaaS",
    "Random",
    "RanksPages",
    "Recall",
    "Recency",
    "SavesTokens",
    "SelectsPages",
    "Shape",
    "SharesTable",
    "ShiftsKeys",
    "SnapKV",
    "Step",
    "StreamingLLM",
    "TokenPolicy",
    "TriAttention",
    "TrimsPrompt",
    "VaSE",
    "available_policies",
    "get_policy_class",
    "grows",
    "make_policy",
    "needs_budget",
    "page_tables",
    "policy_budget",
    "policy_from_dict",
    "policy_spec",
    "policy_to_dict",
    "reads_vectors",
    "register",
    "with_page_size",
]
