"""One JSON file and one page of tables from what the parts have found, rewritten whenever a part ends."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .parts import DENSE, LAYERS, ROUTE, TESTS, Part
from .runner import Outcome
from .sheet import counts, write_json, write_text

WORTH_KEEPING = 1.2
"""Times as fast as the general route: a fused kernel that does not reach it is deleted (docs/gpu.md)."""


class Report:
    """Collects outcomes and writes them down.

    Parameters
    ----------
    plan
        All parts, in order: one that has not ended is in the tables too.
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
        """Take in an outcome, so many seconds after the beginning."""
        self.outcomes[outcome.part.name] = outcome
        self.seconds = round(seconds, 1)

    @property
    def good(self) -> bool:
        """Whether all parts ran to their end and all tests passed."""
        states = {outcome.state for outcome in self.outcomes.values()}
        failed = sum(tests["failed"] for tests in self._tests().values())
        return len(self.outcomes) == len(self.plan) and states <= {"done", "no GPU"} and failed == 0

    def line(self, outcome: Outcome) -> str:
        """One line about an outcome."""
        found, what = outcome.found, outcome.note
        if outcome.part.call == TESTS and found.get("rows"):
            what = ", ".join(f"{n} {word}" for word, n in counts(found["rows"]).items() if n)
            what += f"; {outcome.note}" if outcome.note else ""
        elif outcome.part.call == ROUTE and found.get("rows"):
            row = found["rows"][0]
            what = f"{row['ms']} ms a step, {row['gb_per_s']} GB/s"
        return f"{outcome.state}: {outcome.part.name} ({outcome.seconds:.0f} s) {what}".rstrip()

    def write(self, folder: Path, *, ended: bool = False) -> None:
        """Write JSON and tables."""
        self.ended = ended
        write_json(folder / self.FILES[0], self.content())
        write_text(folder / self.FILES[1], self.markdown())

    def content(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "format": 1,
            "made": self.made,
            "seconds": self.seconds,
            "ended": self.ended,
            "self_test": self.self_test,
            **self._device(),
            "parts": [
                {
                    "name": part.name, "state": self._state(part), "limit_s": part.limit_s,
                    "settings": part.settings,
                }
                | (
                    {"seconds": outcome.seconds, "note": outcome.note, "found": outcome.found}
                    if (outcome := self.outcomes.get(part.name))
                    else {}
                )
                for part in self.plan
            ],
            "routes": self.pairs(),
            "dense": self._rows(DENSE),
            "tests": self._tests(),
        }  # fmt: skip

    def _state(self, part: Part) -> str:
        outcome = self.outcomes.get(part.name)
        return outcome.state if outcome else "not ended"

    def _device(self) -> dict[str, Any]:
        for outcome in self.outcomes.values():
            if "machine" in outcome.found:
                names = ("machine", "versions", "copy_gb_per_s")
                return {name: outcome.found[name] for name in names if name in outcome.found}
        return {}

    def _rows(self, call: str) -> list[dict[str, Any]]:
        """Rows of all parts of a kind, each with its share of the copy's bandwidth."""
        copy = self._device().get("copy_gb_per_s")
        rows = []
        for part in self.plan:
            if part.call == call and part.name in self.outcomes:
                found = self.outcomes[part.name].found
                more = {key: found[key] for key in ("first_step_s", "warm_up_s", "compiled") if key in found}
                rows += [row | more for row in found.get("rows", [])]
        return [row | {"of_copy": round(row["gb_per_s"] / copy, 3) if copy else None} for row in rows]

    def _tests(self) -> dict[str, dict[str, int]]:
        groups: dict[str, Counter[str]] = {}
        for part in self.plan:
            if part.call == TESTS and part.name in self.outcomes:
                group = groups.setdefault(part.settings["group"], Counter(passed=0, failed=0, skipped=0))
                group.update(counts(self.outcomes[part.name].found.get("rows", [])))
        return {name: dict(found) for name, found in groups.items()}

    def pairs(self) -> list[dict[str, Any]]:
        """Cells of the policies, each with both routes, as far as they were measured."""
        cells: dict[tuple[Any, ...], dict[str, Any]] = {}
        keys = ("shape", "layers", "policy", "budget", "rows")
        for row in self._rows(ROUTE):
            key = tuple(row[name] for name in keys)
            cells.setdefault(key, dict(zip(keys, key, strict=True)))[row["route"]] = row
        for cell in cells.values():
            if "general" in cell and "fused" in cell:
                cell["times_as_fast"] = round(
                    cell["general"]["ms_all_layers"] / cell["fused"]["ms_all_layers"], 3
                )
        return list(cells.values())

    # Tables -------------------------------------------------------------------------------------------------

    def markdown(self) -> str:
        """Everything that a person wants to see at once."""
        device, versions = self._device().get("machine", {}), self._device().get("versions", {})
        lines = [f"# GPU check of {self.made}", ""]
        if self.self_test:
            lines += ["**A self-test on tiny shapes: its numbers mean nothing.**", ""]
        if not self.ended:
            lines += ["**Not ended yet, or ended from outside.**", ""]
        lines += [
            f"{device.get('device', 'device unknown')}, {device.get('memory_gb', '?')} GB, copy "
            f"{self._device().get('copy_gb_per_s', '?')} GB/s; "
            + ", ".join(f"{name} {version}" for name, version in versions.items()),
            "",
            f"{self.seconds:.0f} s in all. Times are medians of blocks of 16 steps, the opening of pages included.",
        ]
        return "\n".join([*lines, *self._test_table(), *self._route_table(), *self._dense_table(),
                          *self._kernel_tables(), *self._part_table(), ""])  # fmt: skip

    def _test_table(self) -> list[str]:
        rows = [(group, n["passed"], n["failed"], n["skipped"]) for group, n in self._tests().items()]
        failed = [
            f"- `{row['test'].partition('::')[2]}`: {row.get('message', '')[:160]}".replace("\n", " ")
            for outcome in self.outcomes.values()
            for row in outcome.found.get("rows", [])
            if row.get("outcome") == "failed"
        ]
        return _table("Tests", ("group", "passed", "failed", "skipped"), rows) + (
            ["", *failed] if failed else []
        )

    def _route_table(self) -> list[str]:
        rows = []
        for cell in self.pairs():
            general, fused = cell.get("general", {}), cell.get("fused", {})
            one, faster = fused or general, cell.get("times_as_fast")
            rows.append((
                cell["shape"], cell["layers"], cell["policy"], cell["budget"], cell["rows"],
                general.get("ms", "-"), fused.get("ms", "-"), general.get("ms_all_layers", "-"),
                fused.get("ms_all_layers", "-"), faster or "-",
                "-" if faster is None else "yes" if faster >= WORTH_KEEPING else "no",
                f"{general.get('host_ms', '-')} / {fused.get('host_ms', '-')}",
                _share(general), _share(fused), _megabytes(one.get("kv_bytes")),
                _megabytes(one.get("peak_bytes")),
                f"{general.get('replays_per_step', '-')} / {fused.get('replays_per_step', '-')}",
                f"{general.get('warm_up_s', '-')} / {fused.get('warm_up_s', '-')}",
            ))  # fmt: skip
        head = (
            "shape", "layers", "policy", "budget", "rows", "general ms", "fused ms", f"general at {LAYERS} layers",
            f"fused at {LAYERS} layers", "times as fast", f"{WORTH_KEEPING} or more", "host ms",
            "general of copy", "fused of copy", "K and V MB", "most allocated MB", "graphs a step",
            "compile and warm up s",
        )  # fmt: skip
        return _table("General route and fused kernels, a step", head, rows)

    def _dense_table(self) -> list[str]:
        rows = [
            (
                row["shape"], row["layers"], row["cache"], row["rows"], row["tokens"], row["ms"],
                row["ms_all_layers"], row["host_ms"], _share(row), _megabytes(row["kv_bytes"]),
                _megabytes(row.get("peak_bytes")),
            )
            for row in self._rows(DENSE)
        ]  # fmt: skip
        head = ("shape", "layers", "cache", "rows", "tokens", "ms", f"at {LAYERS} layers", "host ms", "of copy",
                "K and V MB", "most allocated MB")  # fmt: skip
        said = [
            f"- {part.name}: {text}"
            for part in self.plan
            if part.call == DENSE and part.name in self.outcomes
            for found in [self.outcomes[part.name].found]
            for text in (*found.get("errors", ()), *filter(None, [found.get("flash")]))
        ]
        return _table("Dense caches of transformers, a step", head, rows) + (["", *said] if said else [])

    def _kernel_tables(self) -> list[str]:
        lines = []
        for name, outcome in self.outcomes.items():
            if "kernels" in outcome.found:
                rows = [(k["name"], k["calls"], k["ms"]) for k in outcome.found["kernels"][:8]]
                lines += _table(f"What takes long in {name}", ("operation", "a step", "ms a step"), rows)
        return lines

    def _part_table(self) -> list[str]:
        rows = [
            (
                part.name, self._state(part), outcome.seconds if outcome else "-", f"{part.limit_s:.0f}",
                outcome.note.replace("|", "/")[:160] if outcome else "",
            )
            for part in self.plan
            for outcome in [self.outcomes.get(part.name)]
        ]  # fmt: skip
        return _table("Parts", ("part", "state", "seconds", "limit", ""), rows)


def _table(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    if not rows:
        return ["", f"## {title}", "", "Nothing was measured."]
    lines = [head, ["---"] * len(head), *rows]
    return ["", f"## {title}", "", *("| " + " | ".join(map(str, line)) + " |" for line in lines)]


def _share(row: dict[str, Any]) -> str:
    return "-" if row.get("of_copy") is None else f"{row['of_copy']:.0%}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f}"
