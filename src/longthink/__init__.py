"""longthink: long reasoning in constant memory.

``longthink.generate(model, input_ids, decode_budget=1024, max_new_tokens=32768)`` is
``model.generate`` with a KV cache that stays at a fixed size.
"""

from typing import TYPE_CHECKING

from longthink._lazy import lazy_names
from longthink._version import __version__

if TYPE_CHECKING:
    from longthink.config import Budget
    from longthink.errors import (
        BudgetError,
        CacheFileError,
        CacheStateError,
        CacheUnusedWarning,
        EngineError,
        LongthinkError,
        NonFiniteError,
        UnknownPolicyError,
        UnsupportedFeatureError,
        UnsupportedModelError,
    )
    from longthink.hf import Engine, PagedCache, Sampling, generate, load_cache, make_cache
    from longthink.lab.fidelity.api import fidelity
    from longthink.policies import (
        H2O,
        RKV,
        TOVA,
        Dense,
        KeyDiff,
        LazyEviction,
        Milestone,
        Policy,
        Quest,
        RaaS,
        Random,
        Recall,
        Recency,
        SnapKV,
        StreamingLLM,
        TriAttention,
        VaSE,
        available_policies,
        make_policy,
    )

__all__ = [
    "H2O",
    "RKV",
    "TOVA",
    "Budget",
    "BudgetError",
    "CacheFileError",
    "CacheStateError",
    "CacheUnusedWarning",
    "Dense",
    "Engine",
    "EngineError",
    "KeyDiff",
    "LazyEviction",
    "LongthinkError",
    "Milestone",
    "NonFiniteError",
    "PagedCache",
    "Policy",
    "Quest",
    "RaaS",
    "Random",
    "Recall",
    "Recency",
    "Sampling",
    "SnapKV",
    "StreamingLLM",
    "TriAttention",
    "UnknownPolicyError",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
    "VaSE",
    "__version__",
    "available_policies",
    "fidelity",
    "generate",
    "load_cache",
    "make_cache",
    "make_policy",
]

__getattr__ = lazy_names(
    __name__,
    {
        "config": ("Budget",),
        "errors": (
            "BudgetError",
            "CacheFileError",
            "CacheStateError",
            "CacheUnusedWarning",
            "EngineError",
            "LongthinkError",
            "NonFiniteError",
            "UnknownPolicyError",
            "UnsupportedFeatureError",
            "UnsupportedModelError",
        ),
        "hf": ("Engine", "PagedCache", "Sampling", "generate", "load_cache", "make_cache"),
        "lab.fidelity.api": ("fidelity",),
        "policies": (
            "Dense",
            "H2O",
            "KeyDiff",
            "LazyEviction",
            "Milestone",
            "Policy",
            "Quest",
            "RKV",
            "RaaS",
            "Random",
            "Recall",
            "Recency",
            "SnapKV",
            "StreamingLLM",
            "TOVA",
            "TriAttention",
            "VaSE",
            "available_policies",
            "make_policy",
        ),
    },
)


def __dir__() -> list[str]:
    return __all__
