"""The parts that the command lines of this folder share."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App

from bench.protocol import ENVIRONMENT
from longthink.cli.app import PASSIVE
from longthink.cli.errors import guarded
from longthink.cli.table import Table
from longthink.cli.terminal import write_table
from longthink.cli.text import for_markdown
from longthink.lab.cli.bench import conditions


def run(command: Callable[..., int], module: str, words: Sequence[str] | None = None) -> int:
    """Run a command with the errors and exit codes of ``longthink``, on ``sys.argv`` unless words are given."""
    app = App(name=f"python -m {module}", suppress_keyboard_interrupt=False)
    app.default(command)

    def action() -> int:
        code = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        return code if isinstance(code, int) else 0

    return guarded(action, debug=False)


def document_path(document: Path | None) -> Path | None:
    """Check the name of a Markdown file to write, and make its folder."""
    if document is not None:
        if document.suffix != ".md":
            raise ValueError(f"document={str(document)!r} must end in .md")
        document.parent.mkdir(parents=True, exist_ok=True)
    return document


def setup(module: str, budget: str) -> dict[str, Any]:
    """Return command line, software, hardware and load of a run; workers always wait passively."""
    # Not sys.orig_argv: its paths are those of one machine.
    command = f"python -m {module} {shlex.join(sys.argv[1:])}".strip()
    return (
        conditions() | {name: ENVIRONMENT[name] for name in PASSIVE} | {"command": command, "budget": budget}
    )


def document_text(title: str, how: dict[str, Any], parts: Sequence[Table | str]) -> str:
    """Return a page: its title, how and where the run took place, and the tables and figures."""
    hardware = how["hardware"]
    libraries = [
        f"- {environment}: " + ", ".join(f"{name} {number}" for name, number in versions.items())
        for environment, versions in how["peers"].items()
    ]
    head = [
        f"# {title}",
        "",
        "What is measured, and how: docs/bench.md.",
        "",
        f"    {how['command']}",
        "",
        f"- {for_markdown(str(hardware['processor']))}, {hardware['cores']} cores, "
        f"Python {how['versions']['python']}, {how['budget']}, one thread, CPU time",
        f"- load {how['load_before']} before and {how['load_after']} after",
        *libraries,
    ]
    pages = ["\n".join(head), *(part.markdown() if isinstance(part, Table) else part for part in parts)]
    return "\n\n".join(page.strip() for page in pages) + "\n"


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables on standard output."""
    for table in tables:
        write_table(table)
