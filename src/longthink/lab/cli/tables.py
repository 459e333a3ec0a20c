"""Tables whose first column is a policy, and the texts of their cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from longthink.cli.terminal import visible

if TYPE_CHECKING:
    from rich.table import Table


def policy_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str | None = None
) -> Table:
    """Return a table; columns ``policy`` and ``task`` wrap, all others are numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for heading in headings:
        if heading in ("policy", "task"):
            table.add_column(heading, min_width=14 if heading == "policy" else 10, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def budget_text(budget: int | None, decode_budget: int | None) -> str:
    """Return a budget as text; one on top of the prompt has a plus sign."""
    if budget is not None:
        return str(budget)
    return "-" if decode_budget is None else f"+{decode_budget}"
