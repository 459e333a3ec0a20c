"""Measurements as rows of a result store."""

import json
from datetime import UTC, datetime
from statistics import quantiles
from typing import Any
from uuid import uuid4

from longthink.environment import hardware, versions
from longthink.lab.bench.plan import Plan
from longthink.lab.bench.systems import System
from longthink.lab.results.records import Measurement
from longthink.models import Loaded

_OPTIONAL = (
    "budget", "decode_budget", "ms_per_token", "ms_per_token_low", "ms_per_token_high", "seconds", "rss_bytes",
    "device_bytes",
)  # fmt: skip


def new_run() -> str:
    return uuid4().hex[:12]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values[:1] * 3
    return low, middle, high


def new_row(**fields: Any) -> Measurement:
    known: dict[str, Any] = dict.fromkeys(_OPTIONAL) | {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": json.dumps(versions()),
        "hardware": json.dumps(hardware()),
    }
    return Measurement(**known | fields)


def system_row(plan: Plan, loaded: Loaded, system: System, *, run: str, **fields: Any) -> Measurement:
    return new_row(
        run=f"{run}/{system.name}", system=system.name, model=loaded.name, dtype=loaded.describe()["dtype"],
        budget=system.budget and system.budget.budget,
        decode_budget=system.budget and system.budget.decode_budget, rows=plan.rows,
        prompt_tokens=plan.prompt, kv_bytes=system.kv_bytes, metadata_bytes=system.metadata_bytes,
        fast_forwarded=plan.fast_forward, threads=plan.threads, **fields,
    )  # fmt: skip
