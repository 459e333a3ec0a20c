"""``longthink report``: a page, figures and tables from a result store or from attention traces."""

import shlex
from pathlib import Path

from longthink.cli.progress import progress
from longthink.cli.terminal import write_text
from longthink.cli.text import visible


def report(
    store: str, /, *, out: Path | None = None, against: str | None = None, title: str | None = None
) -> int:
    """Turn a result store into one HTML page that works offline, figures (PNG, PDF) and tables (CSV, Markdown).

    A folder of "longthink trace" becomes an attention page. Prints where the page is.

    Parameters
    ----------
    store
        Folder or URL that eval or bench wrote results to, or folder of traces.
    out
        Folder for the report [default: "report" in the store's folder].
    against
        Another store: compare every setup that both have, and say what changed significantly.
    title
        Heading of the page [default: the store's name].
    """
    from longthink.lab.analyze.store import is_trace_store
    from longthink.lab.report import build, build_attention
    from longthink.lab.results.object_store import is_url

    if is_url(store) and out is None:
        raise ValueError(f"--out is needed for {store}: a report is a folder of files on this machine")
    words = ["longthink", "report", store]
    for name, value in (("--out", out), ("--against", against), ("--title", title)):
        words += [name, str(value)] if value is not None else []
    command = shlex.join(words)
    folder = Path(store, "report") if out is None else out
    if is_trace_store(store) and against is not None:
        raise ValueError(f"--against {against!r} compares result stores, and {store} holds traces")
    with progress(f"reporting on {store}"):
        if is_trace_store(store):
            page = build_attention(store, folder, title=title, command=command)
        else:
            page = build(store, folder, against=against, title=title, command=command)
    write_text(f"{visible(str(page))}\n")
    return 0
