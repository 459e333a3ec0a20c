"""longthink: long reasoning in constant memory.

``longthink.generate(model, input_ids, decode_budget=1024, max_new_tokens=32768)`` is
``model.generate`` with a KV cache that stays at a fixed size.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from longthink._version import __version__

if TYPE_CHECKING:
    from longthink.config import Budget
    from longthink.errors import (
        BudgetError,
        CacheStateError,
        EngineError,
        LongthinkError,
        NonFiniteError,
        UnknownPolicyError,
        UnsupportedFeatureError,
        UnsupportedModelError,
    )
    from longthink.hf import Engine, PagedCache, Sampling, generate, make_cache
    from longthink.policies import (
        H2O,
        Dense,
        Fifo,
        Policy,
        Quest,
        RaaS,
        Random,
        Recency,
        StreamingLLM,
        available_policies,
        make_policy,
    )

# Public names and the modules that have them: torch and transformers are imported when they are first used.
_MODULES = {
    "longthink.config": ("Budget",),
    "longthink.errors": (
        "BudgetError",
        "CacheStateError",
        "EngineError",
        "LongthinkError",
        "NonFiniteError",
        "UnknownPolicyError",
        "UnsupportedFeatureError",
        "UnsupportedModelError",
    ),
    "longthink.hf": ("Engine", "PagedCache", "Sampling", "generate", "make_cache"),
    "longthink.policies": (
        "Dense",
        "Fifo",
        "H2O",
        "Policy",
        "Quest",
        "RaaS",
        "Random",
        "Recency",
        "StreamingLLM",
        "available_policies",
        "make_policy",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "H2O",
    "Budget",
    "BudgetError",
    "CacheStateError",
    "Dense",
    "Engine",
    "EngineError",
    "Fifo",
    "LongthinkError",
    "NonFiniteError",
    "PagedCache",
    "Policy",
    "Quest",
    "RaaS",
    "Random",
    "Recency",
    "Sampling",
    "StreamingLLM",
    "UnknownPolicyError",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
    "__version__",
    "available_policies",
    "generate",
    "make_cache",
    "make_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longthink' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
