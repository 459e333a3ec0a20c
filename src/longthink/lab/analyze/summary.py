"""Means of replays over problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longthink.lab.analyze.whatif import OPTIMUM, Outcome


@dataclass(frozen=True, kw_only=True)
class Mean:
    """What one policy at one budget kept, mean over problems; None where it has no meaning.

    Attributes
    ----------
    page_size
        Tokens in a page of what was replayed.
    problems, no_room
        Problems replayed, and problems whose prompt does not fit, which are in no mean.
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


def means(outcomes: Sequence[Outcome]) -> list[Mean]:
    """Return a row for each policy and budget, in the order in which they come."""
    groups: dict[tuple[str, int | None, int | None], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault((one.policy, one.budget, one.decode_budget), []).append(one)
    rows = []
    for (policy, budget, decode_budget), mine in groups.items():
        ran = [one for one in mine if not one.note]

        def mean(name: str, ran: list[Outcome] = ran, known: bool = True) -> float | None:
            return sum(getattr(one, name) for one in ran) / len(ran) if ran and known else None

        heads = policy != OPTIMUM  # it is found for KV heads, and serves no step in particular
        rows.append(
            Mean(
                policy=policy,
                budget=budget,
                decode_budget=decode_budget,
                page_size=mine[0].page_size,
                problems=len(ran),
                no_room=len(mine) - len(ran),
                recall=mean("recall"),
                worst=mean("worst", known=heads),
                lookups=mean("lookups", known=heads),
                evictions=mean("evictions"),
                regrets=mean("regrets", known=heads),
            )
        )
    return rows
