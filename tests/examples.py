"""How many random examples a property is tried on: few in `make test-fast`, some in `make test`, many by night."""

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("LONGTHINK_EXAMPLES", "1"))
"""``make test EXAMPLES=10`` tries ten times as many, in another order each time."""
_QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def few(examples: int, **more) -> settings:
    """The same examples in every run, so that the quick tests fail only where code has changed."""
    return settings(max_examples=examples, derandomize=True, **_QUIET | more)


def some(examples: int, **more) -> settings:
    return settings(max_examples=examples * TIMES, **_QUIET | more)
