"""``longthink report``: a page, figures and tables from a result store or from attention traces."""

import shlex
from pathlib import Path

from longthink.cli.progress import progress
from longthink.cli.terminal import write_text
from longthink.cli.text import visible


def report(
    store: Path, /, *, out: Path | None = None, against: Path | None = None, title: str | None = None
) -> int:
    """Turn a result store into one HTML page that works offline, figures (PNG, PDF) and tables (CSV, Markdown).

    A folder of "longthink trace" becomes an attention page. Prints where the page is.

    Parameters
    ----------
    store
        Folder that eval or bench wrote results to, or trace traces.
    out
        Folder for the report [default: "report" in the store].
    against
        Another store: compare every setup that both have, and say what changed significantly.
    title
        Heading of the page [default: the store's name].
    """
    from longthink.lab.analyze.store import is_trace_store
    from longthink.lab.report import build, build_attention

    words = ["longthink", "report", str(store)]
    for name, value in (("--out", out), ("--against", against), ("--title", title)):
        words += [name, str(value)] if value is not None else []
    command = shlex.join(words)
    if is_trace_store(store) and against is not None:
        raise ValueError(f"--against {str(against)!r} compares result stores, and {store} holds traces")
    with progress(f"reporting on {store}"):
        if is_trace_store(store):
            page = build_attention(store, out or store / "report", title=title, command=command)
        else:
            page = build(store, out or store / "report", against=against, title=title, command=command)
    write_text(f"{visible(str(page))}\n")
    return 0
