"""Results of a sweep: accuracy, length and failures of each policy at each budget on each task."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from longthink.lab.results.statistics import wilson
from longthink.lab.results.store import ResultStore


@dataclass(frozen=True, kw_only=True)
class Summary:
    task: str
    policy: str
    budget: int | None
    decode_budget: int | None
    problems: int
    samples: int
    accuracy: float  # pass@1: mean over problems of the share of right samples
    low: float  # Wilson 95 % interval with problems as trials
    high: float
    majority: float | None  # problems whose most frequent answer is right; None with one sample each
    tokens: float  # mean
    truncated: int  # hit the token limit
    no_room: int  # counts as wrong, as does NaN
    nan: int
    kv_bytes_peak: float  # mean
    dense_kv_bytes: float  # mean


def summarize(store: ResultStore, configs: Sequence[str]) -> list[Summary]:
    order = {config: i for i, config in enumerate(configs)}
    found = store.query(
        "SELECT config, task, policy, budget, decode_budget, problem, correct, answer, finish, generated_tokens, "
        "kv_bytes_peak, dense_kv_bytes FROM samples WHERE config IN (SELECT unnest($configs)) ORDER BY seed, sample",
        {"configs": list(configs)},
    )
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in sorted(found, key=lambda row: order[row["config"]]):
        key = (row["task"], row["policy"], row["budget"], row["decode_budget"])
        groups.setdefault(key, []).append(row)
    return [_summary(rows) for rows in groups.values()]


def _summary(rows: list[dict[str, Any]]) -> Summary:
    problems: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        problems.setdefault(row["problem"], []).append(row)
    shares = [fmean(row["correct"] for row in samples) for samples in problems.values()]
    low, high = wilson(sum(shares), len(shares))
    several = max(map(len, problems.values())) > 1
    finishes = Counter(row["finish"] for row in rows)
    return Summary(
        **{name: rows[0][name] for name in ("task", "policy", "budget", "decode_budget")},
        problems=len(problems), samples=len(rows), accuracy=fmean(shares), low=low, high=high,
        majority=fmean(map(majority_is_right, problems.values())) if several else None,
        tokens=fmean(row["generated_tokens"] for row in rows), truncated=finishes["length"],
        no_room=finishes["no_room"], nan=finishes["nan"],
        kv_bytes_peak=fmean(row["kv_bytes_peak"] for row in rows),
        dense_kv_bytes=fmean(row["dense_kv_bytes"] for row in rows),
    )  # fmt: skip


def majority_is_right(samples: Sequence[dict[str, Any]]) -> bool:
    """Return whether the most frequent answer is right; of equally frequent ones the earliest counts.

    All right answers are one, whatever their form; wrong ones differ by their text. No answer, no vote.
    """
    given = [row for row in samples if row["answer"]]
    votes = Counter("right" if row["correct"] else f"wrong: {row['answer']}" for row in given)
    return bool(votes) and votes.most_common(1)[0][0] == "right"
