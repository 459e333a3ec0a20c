"""``longthink report``: a page, figures and tables from a result store."""

from __future__ import annotations

import shlex
from pathlib import Path

from longthink.cli.progress import progress
from longthink.cli.terminal import visible, write_text


def report(
    store: Path, /, *, out: Path | None = None, against: Path | None = None, title: str | None = None
) -> int:
    """Turn a result store into one HTML page that works offline, figures (PNG, PDF) and tables (CSV, Markdown).

    Prints where the page is.

    Parameters
    ----------
    store
        Folder that eval or bench wrote results to.
    out
        Folder for the report [default: "report" in the store].
    against
        Another store: compare every setup that both have, and say what changed significantly.
    title
        Heading of the page [default: the store's name].
    """
    from longthink.report import build

    words = ["longthink", "report", str(store)]
    for name, value in (("--out", out), ("--against", against), ("--title", title)):
        words += [name, str(value)] if value is not None else []
    with progress(f"reporting on {store}"):
        page = build(store, out or store / "report", against=against, title=title, command=shlex.join(words))
    write_text(f"{visible(str(page))}\n")
    return 0
