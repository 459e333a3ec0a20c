"""Means of replays over problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longthink.lab.analyze.replays import OPTIMUM, Replay


@dataclass(frozen=True, kw_only=True)
class Mean:
    """What one policy at one budget kept: means over `problems`, None where a value has no meaning.

    The prompts of `no_room` other problems do not fit; they are in no mean.
    """

    policy: str
    budget: int | None
    decode_budget: int | None
    page_size: int
    problems: int
    no_room: int
    recall: float | None
    worst: float | None
    lookups: float | None
    evictions: float | None
    regrets: float | None


def means(replays: Sequence[Replay]) -> list[Mean]:
    """Return a row for each policy and budget, in the order in which they appear."""
    groups: dict[tuple[str, int | None, int | None], list[Replay]] = {}
    for one in replays:
        groups.setdefault((one.policy, one.budget, one.decode_budget), []).append(one)
    rows = []
    for (policy, budget, decode_budget), group in groups.items():
        ran = [one for one in group if not one.note]
        values: dict[str, float | None] = {}
        for name in ("recall", "worst", "lookups", "evictions", "regrets"):
            # The optimum is found per KV head, and serves no step in particular.
            known = ran and (policy != OPTIMUM or name in ("recall", "evictions"))
            values[name] = sum(getattr(one, name) for one in ran) / len(ran) if known else None
        rows.append(
            Mean(policy=policy, budget=budget, decode_budget=decode_budget, page_size=group[0].page_size,
                 problems=len(ran), no_room=len(group) - len(ran), **values)
        )  # fmt: skip
    return rows
