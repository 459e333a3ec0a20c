"""Errors of longthink. All derive from `LongthinkError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LongthinkError(Exception):
    """Base of all errors of longthink."""


class BudgetError(LongthinkError, ValueError):
    """The prompt exceeds the budget, or the policy does not take the budget."""


class UnknownPolicyError(LongthinkError, ValueError):
    """No such policy is registered."""


class UndeclaredNeedError(LongthinkError, ValueError):
    """A policy reads data that it has not declared in `needs`."""

    def __init__(self, need: str, what: str) -> None:
        super().__init__(f'a policy that reads {what} must declare it: add "{need}" to its `needs`')


class UnsupportedModelError(LongthinkError, ValueError):
    """The model has layers that a bounded cache cannot serve correctly."""


class UnsupportedFeatureError(LongthinkError, ValueError):
    """A generation mode that a bounded cache cannot serve correctly."""


class CacheStateError(LongthinkError, RuntimeError):
    """The cache was used in a way that would silently give wrong results."""


class CacheFileError(LongthinkError, ValueError):
    """A cache cannot be written to a file, or a file holds no cache for this model; the message says why."""


class StatsFileError(LongthinkError, ValueError):
    """Statistics of queries cannot be written, or a file holds none for this model; the message says why."""


class CacheUnusedWarning(UserWarning):
    """A cache is open and the model decodes without it, so nothing bounds its memory."""


class NonFiniteError(LongthinkError, ArithmeticError):
    """The model produced NaN: its weights or inputs are corrupt."""


class EngineError(LongthinkError, RuntimeError):
    """The engine is closed, or failed while decoding this request; the cause is chained."""


class DataError(LongthinkError, ValueError):
    """A problem set is invalid; the message names file, line and the expected content."""


class MissingExtraError(LongthinkError, ImportError):
    """A required package is not installed; the message names the extra that provides it."""


class GraderError(LongthinkError, RuntimeError):
    """The grading process cannot be started."""


class ResultStoreError(LongthinkError, ValueError):
    """A result store, a file in it or a record for it is invalid."""


class TraceError(LongthinkError, ValueError):
    """Recorded traces are corrupt, have other settings, or lack data for the replay."""


class BenchError(LongthinkError, RuntimeError):
    """A measuring process has failed."""


class SweepError(LongthinkError, RuntimeError):
    """A sweep has stopped; its stored results remain, and the same command resumes it."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Raise `MissingExtraError`, which names the extra to install, if an import in the ``with`` block fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'the package {error.name!r} is not installed: pip install "longthink[{extra}]"', name=error.name
        ) from error
