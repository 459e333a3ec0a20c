"""One JSON file and one page of tables from the results of the parts, rewritten whenever a part ends."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .parts import DENSE, ROUTE, TESTS, Part
from .runner import Outcome
from .sheet import counts, write_json, write_text
from .tables import page

CELL = ("shape", "layers", "layers_of", "policy", "budget", "rows")


class Report:
    """Collects outcomes and writes the files.

    Parameters
    ----------
    plan
        All parts, in order. Those that have not ended are listed too.
    self_test
        Whether this is the small plan, on the CPU.
    """

    FILES = ("gpu-check.json", "gpu-check.md", "gpu-check.log")

    def __init__(self, plan: list[Part], *, self_test: bool) -> None:
        self.plan, self.self_test = plan, self_test
        self.outcomes: dict[str, Outcome] = {}
        self.seconds = 0.0
        self.ended = False
        self.made = datetime.now(UTC).isoformat(timespec="seconds")

    def add(self, outcome: Outcome, seconds: float) -> None:
        """Add an outcome, `seconds` after the start."""
        self.outcomes[outcome.part.name] = outcome
        self.seconds = round(seconds, 1)

    @property
    def good(self) -> bool:
        """Whether all parts completed and all tests passed."""
        states = {outcome.state for outcome in self.outcomes.values()}
        failed = sum(tests["failed"] for tests in self._tests().values())
        return len(self.outcomes) == len(self.plan) and states <= {"done", "no GPU"} and failed == 0

    def line(self, outcome: Outcome) -> str:
        """One-line summary of an outcome."""
        rows, what = outcome.found.get("rows"), outcome.note
        if outcome.part.call == TESTS and rows:
            what = ", ".join(f"{n} {word}" for word, n in counts(rows).items() if n)
            what += f"; {outcome.note}" if outcome.note else ""
        elif outcome.part.call == ROUTE and rows:
            what = f"{rows[0]['ms']} ms a step, {rows[0]['gb_per_s']} GB/s {outcome.note}"
        return f"{outcome.state}: {outcome.part.name} ({outcome.seconds:.0f} s) {what}".rstrip()

    def write(self, folder: Path, *, ended: bool = False) -> None:
        self.ended = ended
        content = self.content()
        write_json(folder / self.FILES[0], content)
        write_text(folder / self.FILES[1], page(content))

    def content(self) -> dict[str, Any]:
        """Content of the JSON file."""
        return {
            "format": 1,
            "made": self.made,
            "seconds": self.seconds,
            "ended": self.ended,
            "self_test": self.self_test,
            **self._device(),
            "tests": self._tests(),
            "routes": self._pairs(),
            "dense": self._rows(DENSE),
            "parts": [self._part(part) for part in self.plan],
        }

    def _part(self, part: Part) -> dict[str, Any]:
        entry = {"name": part.name, "limit_s": part.limit_s, "settings": part.settings, "state": "not ended"}
        outcome = self.outcomes.get(part.name)
        if outcome is not None:
            entry |= {"state": outcome.state, "seconds": outcome.seconds, "note": outcome.note}
            entry["found"] = outcome.found
        return entry

    def _device(self) -> dict[str, Any]:
        names = ("machine", "versions", "copy_gb_per_s")
        for outcome in self.outcomes.values():
            if "machine" in outcome.found:
                return {name: outcome.found[name] for name in names if name in outcome.found}
        return {}

    def _ended(self, call: str) -> list[Outcome]:
        """Outcomes of the parts of a kind, in the order of the plan."""
        return [
            self.outcomes[part.name] for part in self.plan if part.call == call and part.name in self.outcomes
        ]

    def _rows(self, call: str) -> list[dict[str, Any]]:
        """Rows of all parts of a kind, each with its share of the copy bandwidth."""
        copy, rows = self._device().get("copy_gb_per_s"), []
        for outcome in self._ended(call):
            more = {name: outcome.found.get(name) for name in ("first_step_s", "warm_up_s", "compiled")}
            for row in outcome.found.get("rows", []):
                rows.append(row | more | {"of_copy": round(row["gb_per_s"] / copy, 3) if copy else None})
        return rows

    def _tests(self) -> dict[str, dict[str, int]]:
        """How many tests of each file passed, failed and were skipped."""
        files: dict[str, list[dict[str, Any]]] = {}
        for outcome in self._ended(TESTS):
            for row in outcome.found.get("rows", []):
                files.setdefault(Path(row["test"].partition("::")[0]).stem, []).append(row)
        return {name.removeprefix("test_"): counts(rows) for name, rows in files.items()}

    def _pairs(self) -> list[dict[str, Any]]:
        """Cells of the policies, each with the routes that were measured."""
        cells: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in self._rows(ROUTE):
            key = tuple(row[name] for name in CELL)
            cells.setdefault(key, dict(zip(CELL, key, strict=True)))[row["route"]] = row
        for cell in cells.values():
            if "general" in cell and "fused" in cell:
                times = cell["general"]["ms_all_layers"] / cell["fused"]["ms_all_layers"]
                cell["times_as_fast"] = round(times, 3)
        return list(cells.values())
