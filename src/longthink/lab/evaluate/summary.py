"""What a sweep found: accuracy, length and failures of each policy at each budget on each task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from longthink.lab.results.statistics import wilson
from longthink.lab.results.store import ResultStore

_FIELDS = (
    "task, policy, budget, decode_budget, problem, seed, sample, correct, answer, finish, generated_tokens, "
    "kv_bytes_peak, dense_kv_bytes"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy at one budget on one task.

    Attributes
    ----------
    problems, samples
        Problems, and samples of all of them (all seeds).
    accuracy
        pass@1: mean over the problems of the share of right samples.
    low, high
        Wilson 95 % interval of the accuracy, with the problems as trials.
    majority
        Share of problems whose most frequent answer is right; None with one sample of each problem.
    tokens
        Mean number of generated tokens.
    truncated, no_room, nan
        Samples that were cut off, whose prompt did not fit, and in which the model's numbers broke. All count as
        samples; the last two count as wrong.
    kv_bytes_peak, dense_kv_bytes
        Means over the samples.
    """

    task: str
    policy: str
    budget: int | None
    decode_budget: int | None
    problems: int
    samples: int
    accuracy: float
    low: float
    high: float
    majority: float | None
    tokens: float
    truncated: int
    no_room: int
    nan: int
    kv_bytes_peak: float
    dense_kv_bytes: float


def summarize(store: ResultStore, configs: Sequence[str]) -> list[Row]:
    """Return a row for each task, policy and budget of some configurations, in their order.

    Parameters
    ----------
    configs
        Hashes of the setups (`Setup.config_hash`); what else the store holds does not count.
    """
    order = {config: i for i, config in enumerate(configs)}
    found = store.query(
        f"SELECT config, {_FIELDS} FROM samples WHERE config IN (SELECT unnest($configs)) ORDER BY seed, sample",
        {"configs": list(configs)},
    )
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in sorted(found, key=lambda row: order[row["config"]]):
        key = (row["task"], row["policy"], row["budget"], row["decode_budget"])
        groups.setdefault(key, []).append(row)
    return [_row(key, rows) for key, rows in groups.items()]


def _row(key: tuple[Any, ...], rows: list[dict[str, Any]]) -> Row:
    problems: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        problems.setdefault(row["problem"], []).append(row)
    shares = [fmean(row["correct"] for row in samples) for samples in problems.values()]
    low, high = wilson(sum(shares), len(shares))
    several = max(map(len, problems.values())) > 1
    finishes = Counter(row["finish"] for row in rows)
    task, policy, budget, decode_budget = key
    return Row(
        task=task,
        policy=policy,
        budget=budget,
        decode_budget=decode_budget,
        problems=len(problems),
        samples=len(rows),
        accuracy=fmean(shares),
        low=low,
        high=high,
        majority=fmean(map(majority_is_right, problems.values())) if several else None,
        tokens=fmean(row["generated_tokens"] for row in rows),
        truncated=finishes["length"],
        no_room=finishes["no_room"],
        nan=finishes["nan"],
        kv_bytes_peak=fmean(row["kv_bytes_peak"] for row in rows),
        dense_kv_bytes=fmean(row["dense_kv_bytes"] for row in rows),
    )


def majority_is_right(samples: Sequence[dict[str, Any]]) -> bool:
    """Say whether the most frequent answer is right; of equally frequent ones the earliest counts.

    Right answers are one answer, however they are written; wrong ones are told apart by their text. Samples without
    an answer have no vote.
    """
    votes = Counter(
        "right" if row["correct"] else f"wrong: {row['answer']}" for row in samples if row["answer"]
    )
    return bool(votes) and votes.most_common(1)[0][0] == "right"
