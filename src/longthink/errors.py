"""Errors that longthink raises on purpose. All derive from `LongthinkError`."""


class LongthinkError(Exception):
    """Base of every error that longthink raises on purpose."""


class BudgetError(LongthinkError, ValueError):
    """The prompt does not fit in the budget, or the budget makes no sense for the policy."""


class UnknownPolicyError(LongthinkError, ValueError):
    """No policy of that name is registered."""


class UnsupportedModelError(LongthinkError, ValueError):
    """The model has layers that a bounded page cache cannot serve right."""


class UnsupportedFeatureError(LongthinkError, ValueError):
    """A way of generating that a bounded page cache cannot serve right."""


class CacheStateError(LongthinkError, RuntimeError):
    """The cache was used in a way that would give wrong results silently."""


class NonFiniteError(LongthinkError, ArithmeticError):
    """The model produced NaN: its weights or inputs are damaged."""
