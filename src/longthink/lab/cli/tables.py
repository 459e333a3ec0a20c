"""The tables of the laboratory's commands, and the texts of their cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from longthink.cli.app import PASSIVE
from longthink.cli.table import Table
from longthink.cli.terminal import out_console, write_table
from longthink.cli.text import size_text, visible

if TYPE_CHECKING:
    from longthink.lab.results.records import Measurement

HF = "hf "  # prefix of the names of transformers' own caches


def policy_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> Table:
    """Return a table of finished texts; columns ``policy`` and ``task`` wrap, all others are numbers."""
    columns = {heading: "words" if heading in ("policy", "task") else "formatted" for heading in headings}
    return Table(columns=columns, rows=[list(row) for row in rows], note=caption)


def budget_text(budget: int | None, decode_budget: int | None) -> str:
    if budget is not None:
        return str(budget)
    return "-" if decode_budget is None else f"+{decode_budget}"


def print_measurements(rows: Sequence[Measurement], conditions: dict[str, Any]) -> None:
    if rows[0].kind == "jct":
        each = "milliseconds per token, after this many decoded tokens"
        whole = "seconds to decode this many tokens, with the prompt"
        _by_length(each, rows, lambda row: f"{row.ms_per_token:.2f}")
        _by_length(whole, rows, lambda row: f"{row.seconds:.1f}")
    _by_length("keys and values", rows, lambda row: size_text(row.kv_bytes))
    if rows[0].kind == "memory":
        _by_length("other tensors of the cache", rows, lambda row: size_text(row.metadata_bytes))
        _by_length("resident memory of the process", rows, lambda row: size_text(row.rss_bytes or 0))
        if rows[0].device_bytes is not None:
            _by_length("memory of the accelerator", rows, lambda row: size_text(row.device_bytes or 0))
    for line in (*_comparison(rows), *_setup(rows[0], conditions)):
        out_console().print(visible(line), markup=False)


def _by_length(title: str, rows: Sequence[Measurement], cell: Callable[[Measurement], str]) -> None:
    lengths = sorted({row.decode_tokens for row in rows})
    lines = []
    for system in dict.fromkeys(row.system for row in rows):
        at = {row.decode_tokens: cell(row) for row in rows if row.system == system}
        lines.append([system, *(at.get(length, "-") for length in lengths)])
    columns = {"cache": "words"} | {str(length): "formatted" for length in lengths}
    write_table(Table(title=title, columns=columns, rows=lines))


def _comparison(rows: Sequence[Measurement]) -> list[str]:
    lines = []
    timed = [row for row in rows if row.ms_per_token is not None]
    lengths = sorted({row.decode_tokens for row in timed})
    for length in dict.fromkeys([*lengths[:1], *lengths[-1:]]):
        here = {row.system: row.ms_per_token or 0.0 for row in timed if row.decode_tokens == length}
        theirs = {name: ms for name, ms in here.items() if name.startswith(HF)}
        if theirs and len(here) > len(theirs):
            best = min(theirs, key=theirs.__getitem__)
            ratios = [f"{name} {ms / theirs[best]:.2f}" for name, ms in here.items() if name not in theirs]
            lines.append(
                f"After {length} tokens the best dense cache of transformers is {best}, {theirs[best]:.2f} ms per "
                f"token. Relative to it: {', '.join(ratios)}."
            )
    return lines


def _setup(row: Measurement, conditions: dict[str, Any]) -> list[str]:
    filled = "filled with random data up to each length" if row.fast_forwarded else "decoded token by token"
    versions, hardware = conditions["versions"], conditions["hardware"]
    device = hardware.get("accelerator", hardware["processor"])
    waits = ", ".join(f"{name}={conditions[name] or 'not set'}" for name in PASSIVE)
    return [
        f"{row.model}, {row.dtype}, {conditions['budget']}, prompt of {row.prompt_tokens} tokens, "
        f"rows: {row.rows}, caches {filled}",
        f"{device}, {hardware['cores']} cores, threads: {conditions['threads']}, {waits}, "
        f"load {conditions['load_before']} before and {conditions['load_after']} after",
        f"longthink {versions['longthink']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"Python {versions['python']}",
    ]
