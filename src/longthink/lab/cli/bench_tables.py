"""The tables of ``longthink bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from longthink.cli.terminal import out_console, size_text, visible, write_table

if TYPE_CHECKING:
    from longthink.lab.bench.kernels import KernelTime
    from longthink.lab.results.records import Measurement

HF = "hf "
"""How the names of transformers' own caches begin."""


def print_tables(rows: Sequence[Measurement], conditions: dict[str, Any]) -> None:
    """Print what was measured, a column for each length, and how it was measured."""
    if rows[0].kind == "jct":
        _print("milliseconds per token, after this many decoded tokens", rows, _milliseconds)
        _print("seconds to decode this many tokens, with the prompt", rows, _seconds)
    _print("keys and values", rows, lambda row: size_text(row.kv_bytes))
    if rows[0].kind == "memory":
        _print("other tensors of the cache", rows, lambda row: size_text(row.metadata_bytes))
        _print("resident memory of the process", rows, _resident)
        if rows[0].device_bytes is not None:
            _print("memory of the accelerator", rows, lambda row: size_text(row.device_bytes or 0))
    console = out_console()
    for line in (*_comparison(rows), *_how(rows[0], conditions)):
        console.print(visible(line), markup=False)


def print_kernels(rows: Iterable[KernelTime]) -> None:
    """Print the time of every kernel at every shape as soon as it is measured."""
    console = out_console()
    console.print(f"{'model':<14}{'system':<20}{'rows':>5}{'tokens':>8}{'ms':>10}{'GB/s':>8}  of a copy")
    for row in rows:
        text = (
            f"{row.model:<14}{row.system:<20}{row.rows:>5}{row.tokens:>8}{row.ms:>10.4f}{row.gb_per_s:>8.0f}"
        )
        console.print(visible(f"{text}{row.of_copy:>10.0%}"), markup=False)


def _milliseconds(row: Measurement) -> str:
    return f"{row.ms_per_token:.2f}"


def _seconds(row: Measurement) -> str:
    return f"{row.seconds:.1f}"


def _resident(row: Measurement) -> str:
    return size_text(row.rss_bytes or 0)


def _print(title: str, rows: Sequence[Measurement], cell: Callable[[Measurement], str]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lengths = sorted({row.decode_tokens for row in rows})
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("cache", no_wrap=True)
    for length in lengths:
        table.add_column(str(length), justify="right", no_wrap=True)
    for system in dict.fromkeys(row.system for row in rows):
        at = {row.decode_tokens: cell(row) for row in rows if row.system == system}
        table.add_row(Text(visible(system)), *(at.get(length, "-") for length in lengths))
    out_console().print(title)
    write_table(table)


def _comparison(rows: Sequence[Measurement]) -> list[str]:
    """Compare every policy with the fastest cache of transformers, at the first and the last length."""
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
                f"token. Times its time: {', '.join(ratios)}."
            )
    return lines


def _how(row: Measurement, conditions: dict[str, Any]) -> list[str]:
    """Say how it was measured."""
    filled = (
        "filled with made-up contents up to each length" if row.fast_forwarded else "decoded token by token"
    )
    versions, hardware = conditions["versions"], conditions["hardware"]
    device = hardware.get("accelerator", hardware["processor"])
    waits = ", ".join(
        f"{name}={conditions[name] or 'not set'}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    )
    return [
        f"{row.model}, {row.dtype}, {conditions['budget']}, prompt of {row.prompt_tokens} tokens, "
        f"rows: {row.rows}, caches {filled}",
        f"{device}, {hardware['cores']} cores, threads: {conditions['threads']}, {waits}, "
        f"load {conditions['load_before']} before and {conditions['load_after']} after",
        f"longthink {versions['longthink']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"Python {versions['python']}",
    ]


def document_head(title: str, how: dict[str, Any]) -> str:
    """Return the title of a page, and how and where the run took place."""
    from longthink.cli.text import for_markdown

    hardware = how["hardware"]
    libraries = [
        f"- {environment}: " + ", ".join(f"{name} {number}" for name, number in versions.items())
        for environment, versions in how["peers"].items()
    ]
    lines = [
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
    return "\n".join(lines)
