"""A run of ``longthink bench peers`` as files: a page of Markdown, the rows as JSON, figures as PNG."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longthink.lab.bench.peers.measure import Found
from longthink.lab.cli.bench_tables import document_head
from longthink.lab.report.measured import measurement_figures
from longthink.lab.report.plots import save_figures
from longthink.lab.report.style import make_styles
from longthink.lab.report.tables import Table
from longthink.lab.results.records import to_row


def as_json(found: Found, how: dict[str, Any]) -> dict[str, Any]:
    """Return everything that was measured, ready for JSON."""
    rows = [
        {"scene": one.scene, "rounds_ms": one.ms, "read_bytes": one.read_bytes, **to_row(one.row)}
        for one in found.timed
    ]
    return {"conditions": how, "missing": found.missing, "rows": rows}


def write_document(path: Path, tables: Sequence[Table], found: Found, how: dict[str, Any]) -> None:
    """Write the page, and beside it a folder of the same name with ``rows.json`` and the figures.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(as_json(found, how), indent=1) + "\n", encoding="utf-8")
    rows = [to_row(one.row) for one in found.timed]
    figures = measurement_figures(rows, make_styles(row["system"] for row in rows))
    with tempfile.TemporaryDirectory() as drawn:
        save_figures(figures, Path(drawn))
        for figure in figures:
            shutil.move(Path(drawn) / f"{figure.name}.png", folder / f"{figure.name}.png")
    pictures = [f"![{figure.title}]({folder.name}/{figure.name}.png)" for figure in figures]
    parts = [document_head("Beside other libraries", how), *(table.markdown() for table in tables), *pictures]
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
