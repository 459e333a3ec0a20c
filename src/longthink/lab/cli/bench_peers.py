"""``longthink bench peers``: our caches beside those of other libraries, and the targets that we set ourselves."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cyclopts import Parameter

from longthink.cli.errors import EXIT_INTERRUPTED
from longthink.cli.options import Switch, policy_specs
from longthink.cli.progress import progress
from longthink.cli.terminal import note, write_json
from longthink.config import check_choice
from longthink.errors import needs_extra
from longthink.lab.bench.peers.plan import PEERS, POLICIES, QUICK, PeersPlan
from longthink.lab.cli.bench import conditions, load, open_store, words


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PeersOptions:
    """Options of ``longthink bench peers``."""

    peers: str | None = None
    """Peers to measure, separated by commas [default: all; --quick: those that the targets need]."""

    policies: str | None = None
    """Policies of ours, separated by commas [default: all but the controls; --quick: dense,raas,milestone]."""

    quick: Switch = False
    """Measure what the targets need and no more: one context, one batch, three rounds."""

    rounds: int | None = None
    """Timed blocks of each system at each place [default: 5; --quick: 3]."""

    out: Path | None = None
    """Result store to add the rows to; "longthink report" draws it."""

    document: Path | None = None
    """Markdown file to write; rows (JSON) and figures (PNG) go into a folder beside it, of the same name."""

    json: Switch = False
    """Print one JSON document instead of the tables."""

    def plan(self) -> PeersPlan:
        """Return what to measure.

        Raises
        ------
        ValueError
            If an option is out of range.
        """
        if self.document is not None and self.document.suffix != ".md":
            raise ValueError(f"document={str(self.document)!r} must end in .md")
        values: dict[str, Any] = {"peers": tuple(PEERS.values()), "policies": POLICIES}
        values |= QUICK if self.quick else {}
        if self.peers is not None:
            for name in words(self.peers):
                check_choice("peers", name, tuple(PEERS))
            values["peers"] = tuple(PEERS[name] for name in dict.fromkeys(words(self.peers)))
        if self.policies is not None:
            values["policies"] = tuple(policy_specs(self.policies))
        if self.rounds is not None:
            values["rounds"] = self.rounds
        return PeersPlan(**values)


_DEFAULTS = PeersOptions()


def peers(*, options: PeersOptions = _DEFAULTS) -> int:
    """Measure time per token and memory beside other libraries, and compare with the targets of this project.

    Every peer runs in a process and a virtual environment of its own, made at the first call from pinned packages
    (minutes, a few GB). All decode the same random models in turns, on one thread; times are CPU time. A peer that
    cannot be measured is listed as missing.
    """
    from longthink.lab.bench.peers.measure import Found, measure
    from longthink.lab.cli.peers_document import as_json, write_document
    from longthink.lab.cli.peers_tables import make_tables, print_table

    plan = options.plan()
    with needs_extra("bench"):
        import matplotlib  # noqa: F401
    store = open_store(options.out)
    found, code = Found(), 0
    how = conditions() | {
        "command": shlex.join(["longthink", *sys.argv[1:]]),
        "budget": f"budget={plan.budget}",
    }
    try:
        with progress("measuring", total=None) as task:
            for one in measure(plan, found, partial(task.advance_to, 0)):
                if store is not None:
                    store.add(one.row)
    except KeyboardInterrupt:
        note(f"interrupted: {len(found.timed)} places were measured")
        code = EXIT_INTERRUPTED
    how |= {"load_after": load(), "peers": found.versions}
    tables = make_tables(plan, found)
    if options.document is not None:
        write_document(options.document, tables, found, how)
    if options.json:
        write_json(as_json(found, how))
    else:
        for table in tables:
            print_table(table)
    return code
