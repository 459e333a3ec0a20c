"""``python -m bench.peers``: our caches beside those of other libraries, and the targets of this project."""

from __future__ import annotations

import json as jsons
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.command import document_path, document_text, print_tables, run, setup
from bench.peers import measure
from bench.peers.plan import PEERS, POLICIES, QUICK, PeersPlan
from bench.peers.tables import make_tables
from longthink.cli.errors import EXIT_INTERRUPTED
from longthink.cli.options import Switch, policy_specs, words
from longthink.cli.progress import progress
from longthink.cli.table import Table
from longthink.cli.terminal import note, write_json
from longthink.config import check_choice
from longthink.errors import needs_extra
from longthink.lab.cli.bench import load, store_for
from longthink.lab.report.measured import measurement_figures
from longthink.lab.report.plots import save_figures
from longthink.lab.report.style import make_styles
from longthink.lab.results.records import to_row


def peers(
    *,
    peers: str | None = None,
    policies: str | None = None,
    quick: Switch = False,
    rounds: int | None = None,
    out: str | None = None,
    document: Path | None = None,
    json: Switch = False,
) -> int:
    """Measure time per token and memory beside other libraries, and compare with the targets of this project.

    Every peer runs in a process and a virtual environment of its own, made at the first call from pinned packages
    (minutes, a few GB). All decode the same random models in turns, on one thread; times are CPU time. A peer that
    cannot be measured is listed as missing.

    Parameters
    ----------
    peers
        Peers to measure, separated by commas [default: all; --quick: those that the targets need].
    policies
        Policies to measure, separated by commas [default: all but the controls; --quick: dense,raas,milestone].
    quick
        Measure only what the targets need: one context, one batch size, three rounds.
    rounds
        Timed blocks of each system in each state [default: 5; --quick: 3].
    out
        Result store to add the rows to; "longthink report" draws it.
    document
        Markdown file to write; rows (JSON) and figures (PNG) go into a folder of the same name beside it.
    json
        Print one JSON document instead of the tables.
    """
    with needs_extra("plot"):
        import matplotlib  # noqa: F401  (for the figures: not after an hour of measuring)
    plan, page, store = _plan(peers, policies, quick, rounds), document_path(document), store_for(out)
    results, code = measure.Results(), 0
    how = setup("bench.peers", f"budget={plan.budget}")
    try:
        with progress("measuring", total=None) as task:
            for timing in measure.measure(plan, results, partial(task.advance_to, 0)):
                if store is not None:
                    store.add(timing.row)
    except KeyboardInterrupt:
        note(f"interrupted: {len(results.timings)} cases were measured")
        code = EXIT_INTERRUPTED
    how |= {"load_after": load(), "peers": results.versions}
    rows = [
        {"scene": one.scene, "rounds_ms": one.ms, "read_bytes": one.read_bytes, **to_row(one.row)}
        for one in results.timings
    ]
    found = {"conditions": how, "missing": results.missing, "rows": rows}
    tables = make_tables(plan, results)
    if page is not None:
        _write_document(page, tables, results, found)
    if json:
        write_json(found)
    else:
        print_tables(tables)
    return code


def _plan(peers: str | None, policies: str | None, quick: bool, rounds: int | None) -> PeersPlan:
    values: dict[str, Any] = {"peers": tuple(PEERS.values()), "policies": POLICIES} | (QUICK if quick else {})
    if peers is not None:
        for name in words(peers):
            check_choice("peers", name, tuple(PEERS))
        values["peers"] = tuple(PEERS[name] for name in dict.fromkeys(words(peers)))
    if policies is not None:
        values["policies"] = tuple(policy_specs(policies))
    if rounds is not None:
        values["rounds"] = rounds
    return PeersPlan(**values)


def _write_document(
    page: Path, tables: Sequence[Table], results: measure.Results, found: dict[str, Any]
) -> None:
    """Write the page, and ``rows.json`` and the figures into a folder of the same name beside it."""
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    (folder / "rows.json").write_text(jsons.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = [to_row(one.row) for one in results.timings]
    figures = measurement_figures(rows, make_styles(row["system"] for row in rows))
    with tempfile.TemporaryDirectory() as drawn:
        save_figures(figures, Path(drawn))
        for figure in figures:
            shutil.move(Path(drawn) / f"{figure.name}.png", folder / f"{figure.name}.png")
    pictures = [f"![{figure.title}]({folder.name}/{figure.name}.png)" for figure in figures]
    text = document_text("Beside other libraries", found["conditions"], [*tables, *pictures])
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run(peers, "bench.peers"))
