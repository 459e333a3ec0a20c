"""Results of a measurement of fidelity: each policy at each budget, with intervals over texts, and differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longthink.lab.results.statistics import Interval, ratio_bootstrap
from longthink.lab.results.store import ResultStore

MEASURES = ("loss", "kl", "differs", "long_loss", "long_kl", "long_differs")
"""Rise of the loss (nats per token), KL divergence (nats), share of tokens whose most likely next token differs; and
the same on long-range tokens."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One policy at one budget. A measure is None where no token was scored for it."""

    source: str
    policy: str
    budget: int | None
    decode_budget: int | None
    texts: int  # with scored tokens
    unscored: int  # too short for the budget, or no room for the prompt
    tokens: int
    long_tokens: int
    loss: Interval | None
    kl: Interval | None
    differs: Interval | None
    long_loss: Interval | None
    long_kl: Interval | None
    long_differs: Interval | None
    evicted: float  # share of all tokens, at the end
    kv_bytes: float  # mean over texts, of the tokens resident at the end
    dense_kv_bytes: float
    versus: dict[str, Interval]  # paired differences of the measures from the reference policy, same texts


def summarize(store: ResultStore, configs: Sequence[str], *, reference: str = "recency") -> list[Summary]:
    """Summaries in the order of `configs`; `reference` is the policy that the others are compared with."""
    rows = store.query(
        "SELECT * FROM fidelity WHERE config IN (SELECT unnest($configs)) ORDER BY text",
        {"configs": list(configs)},
    )
    order = {config: i for i, config in enumerate(configs)}
    return summaries(sorted(rows, key=lambda row: order[row["config"]]), reference=reference)


def summaries(rows: Iterable[dict[str, Any]], *, reference: str = "recency") -> list[Summary]:
    """Summaries of the rows of `Fidelity` records, in the order in which their configurations come."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["config"], []).append(row)
    references = {_place(cell[0]): cell for cell in cells.values() if cell[0]["policy"] == reference}
    return [_summary(cell, references.get(_place(cell[0]))) for cell in cells.values()]


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["source"], row["budget"], row["decode_budget"]


def _summary(cell: list[dict[str, Any]], reference: list[dict[str, Any]] | None) -> Summary:
    scored = [row for row in cell if row["tokens"]]
    other = {row["text"]: row for row in reference or ()}
    pairs = [(row, other[row["text"]]) for row in scored if row["text"] in other]
    measured: dict[str, Any] = {}
    versus: dict[str, Interval] = {}
    for name in MEASURES:
        weights = [_weight(row, name) for row in scored]
        measured[name] = (
            ratio_bootstrap([_total(row, name) for row in scored], weights) if sum(weights) else None
        )
        weights = [_weight(row, name) for row, _ in pairs]
        if pairs and sum(weights) and scored[0]["policy"] != pairs[0][1]["policy"]:
            versus[name] = ratio_bootstrap(
                [_total(row, name) - _total(twin, name) for row, twin in pairs], weights
            )
    held = sum(row["kv_bytes"] for row in scored)
    whole = sum(row["dense_kv_bytes"] for row in scored)
    return Summary(
        **{name: cell[0][name] for name in ("source", "policy", "budget", "decode_budget")},
        texts=len(scored), unscored=len(cell) - len(scored), tokens=sum(row["tokens"] for row in scored),
        long_tokens=sum(row["long_tokens"] for row in scored), **measured,
        evicted=1 - held / whole if whole else 0.0, kv_bytes=held / max(1, len(scored)),
        dense_kv_bytes=whole / max(1, len(scored)), versus=versus,
    )  # fmt: skip


def _weight(row: dict[str, Any], name: str) -> int:
    tokens: int = row["long_tokens" if name.startswith("long_") else "tokens"]
    return tokens


def _total(row: dict[str, Any], name: str) -> float:
    if not name.endswith("loss"):
        total: float = row[name]
        return total
    prefix = name.removesuffix("loss")
    rise: float = row[f"{prefix}nll"] - row[f"{prefix}nll_dense"]
    return rise
