"""What a measurement is asked to do, and the rows that it yields."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import quantiles
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from longthink.config import KV_DTYPES, Budget, check_choice, check_int
from longthink.environment import hardware, versions
from longthink.lab.bench.models import RANDOM
from longthink.lab.results.records import Measurement

if TYPE_CHECKING:
    from longthink.lab.bench.systems import System
    from longthink.models import Loaded

BASELINES = ("dynamic", "static", "compiled")
"""The dense caches of transformers: one that grows, one of fixed size, and that one with a compiled model."""
BLOCK = 32
"""Steps that are timed together: every page size divides it, so each block opens its share of pages."""

Report = Callable[[int, str], None]
"""Called with how many blocks or rows are done, and the name of the system that comes next."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes
    ----------
    model, device, dtype
        See `longthink.lab.bench.models.bench_model`.
    policies
        Policies, as texts such as ``raas:r=0.25``.
    baselines
        Some of `BASELINES`.
    budget
        What bounded policies may keep.
    lengths
        Numbers of decoded tokens at which to measure, rising.
    prompt, rows
        Tokens of each prompt, and rows decoded side by side.
    repeats
        Timed blocks of each system at each length.
    threads
        CPU threads of torch.
    compile
        Whether policies are measured with a compiled step as well.
    kv_dtype
        Format that policies keep keys and values in; None for the model's own.
    fast_forward
        Whether caches are filled with made-up contents between the lengths.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    model: str = RANDOM
    device: str = "auto"
    dtype: str = "auto"
    policies: Sequence[str] = ()
    baselines: Sequence[str] = BASELINES
    budget: Budget
    lengths: Sequence[int]
    prompt: int = 128
    rows: int = 1
    repeats: int = 5
    threads: int = 1
    compile: bool = False
    kv_dtype: str | None = None
    fast_forward: bool

    def __post_init__(self) -> None:
        check_int("prompt", self.prompt, 1)
        check_int("rows", self.rows, 1)
        check_int("repeats", self.repeats, 1)
        check_int("threads", self.threads, 1)
        if self.kv_dtype is not None:
            check_choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        for name in self.baselines:
            check_choice("baselines", name, BASELINES)
        if not self.policies and not self.baselines:
            raise ValueError("policies and baselines are empty: name at least one")
        if not self.lengths:
            raise ValueError("lengths is empty: name at least one")
        for length, before in zip(self.lengths, [0, *self.lengths], strict=False):
            check_int("lengths", length, 1)
            if length <= before:
                raise ValueError(f"lengths={','.join(map(str, self.lengths))} must rise")

    @property
    def measured_steps(self) -> int:
        """Steps that are timed at each length, a block to warm up included."""
        return BLOCK * (self.repeats + 1)


_OPTIONAL = ("ms_per_token", "ms_per_token_low", "ms_per_token_high", "seconds", "rss_bytes", "device_bytes")


def new_run() -> str:
    """Return an identifier for a run."""
    return uuid4().hex[:12]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the quartiles of what the rounds of a run have measured; of a single round, that three times."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values[:1] * 3
    return low, middle, high


class Rows:
    """Makes the measurements of one run: what all of them share is known here.

    Parameters
    ----------
    plan
        The run.
    kind
        ``jct`` or ``memory``.
    loaded
        The model.
    run
        Identifier of the run, which its systems share.
    """

    def __init__(self, plan: Plan, kind: str, loaded: Loaded, run: str) -> None:
        self._run = run
        self._shared: dict[str, Any] = {
            "kind": kind,
            "model": loaded.name,
            "dtype": loaded.describe()["dtype"],
            "rows": plan.rows,
            "prompt_tokens": plan.prompt,
            "fast_forwarded": plan.fast_forward,
            "threads": plan.threads,
            "versions": json.dumps(versions()),
            "hardware": json.dumps(hardware()),
        }

    def make(self, system: System, *, decode_tokens: int, **measured: Any) -> Measurement:
        """Return the row of one system at one length; what was not measured is None."""
        budget = system.budget
        fields: dict[str, Any] = dict.fromkeys(_OPTIONAL) | self._shared | measured
        return Measurement(
            run=f"{self._run}/{system.name}",
            system=system.name,
            budget=None if budget is None else budget.budget,
            decode_budget=None if budget is None else budget.decode_budget,
            decode_tokens=decode_tokens,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            kv_bytes=system.kv_bytes,
            metadata_bytes=system.metadata_bytes,
            **fields,
        )
