"""Errors that longthink raises on purpose. All derive from `LongthinkError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LongthinkError(Exception):
    """Base of every error that longthink raises on purpose."""


class BudgetError(LongthinkError, ValueError):
    """The prompt does not fit in the budget, or the budget makes no sense for the policy."""


class UnknownPolicyError(LongthinkError, ValueError):
    """No policy of that name is registered."""


class UndeclaredNeedError(LongthinkError, ValueError):
    """A policy reads what it has not declared in `needs`, and what the cache therefore does not provide."""

    def __init__(self, need: str, what: str) -> None:
        super().__init__(f'a policy that reads {what} must declare it: add "{need}" to its `needs`')


class UnsupportedModelError(LongthinkError, ValueError):
    """The model has layers that a bounded page cache cannot serve right."""


class UnsupportedFeatureError(LongthinkError, ValueError):
    """A way of generating that a bounded page cache cannot serve right."""


class CacheStateError(LongthinkError, RuntimeError):
    """The cache was used in a way that would give wrong results silently."""


class NonFiniteError(LongthinkError, ArithmeticError):
    """The model produced NaN: its weights or inputs are damaged."""


class EngineError(LongthinkError, RuntimeError):
    """The engine is closed, or decoding failed while it had this request; the cause is chained."""


class DataError(LongthinkError, ValueError):
    """A problem set cannot be used; the message names file and line, and what was expected."""


class MissingExtraError(LongthinkError, ImportError):
    """A package is needed that comes with an extra of longthink; the message names the extra."""


class GraderError(LongthinkError, RuntimeError):
    """The process that grades answers cannot be started."""


class ResultStoreError(LongthinkError, ValueError):
    """A result store, a file in it or a record for it is not what it must be."""


class TraceError(LongthinkError, ValueError):
    """Recorded traces cannot be used: damaged, of other settings, or without what a replay needs."""


class BenchError(LongthinkError, RuntimeError):
    """A process that measures something has failed."""


class SweepError(LongthinkError, RuntimeError):
    """A sweep cannot go on; what it has stored stays, and the same command goes on from there."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a failed import in the ``with`` block into an error that names the extra to install.

    Raises
    ------
    MissingExtraError
        If a package that the block imports is not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'the package {error.name!r} is not installed: pip install "longthink[{extra}]"', name=error.name
        ) from error
