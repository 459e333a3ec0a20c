"""Tables whose first column is a policy, and the texts of their cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longthink.cli.table import Table


def policy_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> Table:
    """Return a table of finished texts; columns ``policy`` and ``task`` wrap, all others are numbers."""
    columns = {heading: "words" if heading in ("policy", "task") else "formatted" for heading in headings}
    return Table(columns=columns, rows=[list(row) for row in rows], note=caption)


def budget_text(budget: int | None, decode_budget: int | None) -> str:
    """Return a budget as text; one on top of the prompt has a plus sign."""
    if budget is not None:
        return str(budget)
    return "-" if decode_budget is None else f"+{decode_budget}"
