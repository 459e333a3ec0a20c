"""Figures of measured time and memory against decode length."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longthink.lab.report.cells import Row, Size, size_of
from longthink.lab.report.figures import MIB, Figure, Line, Panel
from longthink.lab.report.style import Style, variant


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """What is drawn of the measurements of one kind."""

    name: str
    kind: str
    section: str
    title: str
    y_label: str
    unit: int
    value: Callable[[Row], float | None]
    quartiles: tuple[str, str] | None = None
    caption: str = ""
    x_label: str = "tokens decoded"
    log_y: bool = False


_CURVES = (
    _Curve(
        name="jct", kind="jct", section="Time", title="Job completion time against decode length",
        y_label="time to this length (s)", unit=1, value=lambda row: row["seconds"],
    ),
    _Curve(
        name="step-time", kind="jct", section="Time", title="Time of one token against decode length",
        y_label="time per token (ms, median)", unit=1, value=lambda row: row["ms_per_token"],
        quartiles=("ms_per_token_low", "ms_per_token_high"), caption="Bars: quartiles.",
    ),
    _Curve(
        name="peers", kind="peers", section="Time", title="Time of one token against context, beside others",
        y_label="time per token (ms, median)", unit=1,
        value=lambda row: row["ms_per_token"],
        quartiles=("ms_per_token_low", "ms_per_token_high"),
        caption="Bars: quartiles. One thread, CPU time, all systems in turns.",
        x_label="tokens of context after the prompt", log_y=True,
    ),
    _Curve(
        name="memory", kind="memory", section="Memory", title="Memory of the cache against decode length",
        y_label="cache (MiB)", unit=MIB,
        value=lambda row: row["kv_bytes"] + row["metadata_bytes"],
        caption="Allocated for keys, values and page tables, all rows together.",
    ),
    _Curve(
        name="memory-device", kind="memory", section="Memory", title="Memory of the accelerator",
        y_label="accelerator (MiB)", unit=MIB, value=lambda row: row["device_bytes"],
        caption="Allocated, with weights and activations.",
    ),
    _Curve(
        name="memory-process", kind="memory", section="Memory", title="Memory of the process",
        y_label="process (MiB)", unit=MIB, value=lambda row: row["rss_bytes"],
        caption="Resident set, with weights, libraries and activations.",
    ),
)  # fmt: skip


def measurement_figures(rows: Sequence[Row], styles: dict[str, Style]) -> list[Figure]:
    """Return the figures of measured time and memory; a panel for each model, batch and machine."""
    figures = []
    for curve in _CURVES:
        chosen = [row for row in rows if row["kind"] == curve.kind and curve.value(row) is not None]
        if not chosen:
            continue
        by_panel: dict[str, list[Row]] = defaultdict(list)
        for row in chosen:
            by_panel[place(row)].append(row)
        caption = curve.caption
        if any(row["fast_forwarded"] for row in chosen):
            caption += " Points whose cache was filled with made-up keys instead of by decoding say so."
        panels = [
            Panel(title=title, lines=_measured(mine, curve, styles))
            for title, mine in sorted(by_panel.items())
        ]
        figures.append(
            Figure(
                name=curve.name,
                section=curve.section,
                title=curve.title,
                caption=caption.strip(),
                x_label=curve.x_label,
                y_label=curve.y_label,
                log_y=curve.log_y,
                panels=panels,
            )
        )
    batches = [row for row in rows if row["kind"] == "batch"]
    return figures + ([_batch_figure(batches, styles)] if batches else [])


def _batch_figure(rows: Sequence[Row], styles: dict[str, Style]) -> Figure:
    """Return throughput against the memory of keys and values; along a line more rows are decoded side by side."""
    runs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        runs[row["system"], row["run"].partition("/")[0]].append(row)
    lines = []
    for (system, _), mine in sorted(runs.items()):
        mine.sort(key=lambda row: row["rows"])
        speeds = [row["rows"] * 1000 / row["ms_per_token"] for row in mine]
        lines.append(
            Line(
                label=system,
                style=styles[system],
                kind="curve",
                x=[row["kv_bytes"] / MIB for row in mine],
                y=speeds,
                hover=[
                    f"{system}\n{speed:,.3g} tokens/s, {row['rows']} rows\n{row['kv_bytes'] / MIB:,.0f} MiB"
                    for row, speed in zip(mine, speeds, strict=True)
                ],
            )
        )
    tokens = sorted({row["prompt_tokens"] + row["decode_tokens"] for row in rows})
    return Figure(
        name="peers-batches",
        section="Time",
        title="Throughput against memory, rows side by side",
        caption=f"After {' / '.join(f'{count:,}' for count in tokens)} tokens in each row; along a line the number "
        f"of rows grows: {', '.join(str(count) for count in sorted({row['rows'] for row in rows}))}.",
        x_label="keys and values (MiB)",
        y_label="tokens per second",
        panels=[Panel(title=f"{rows[0]['model']}; {machine_text(rows[0]['hardware'])}", lines=lines)],
    )


def place(row: Row) -> str:
    """Return what measurements must share to be compared: model, batch, prompt and machine."""
    machine = machine_text(row["hardware"])
    count = "1 row" if row["rows"] == 1 else f"{row['rows']} rows"
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    return f"{row['model']}, {row['dtype']}, {count}, prompt of {row['prompt_tokens']} tokens; {machine}, {threads}"


def machine_text(hardware: str) -> str:
    """Return the accelerator or processor that a record names, or the text itself if it is not as expected."""
    try:
        found = json.loads(hardware)
        return str(found.get("accelerator") or found["processor"])
    except (ValueError, KeyError, AttributeError):
        return hardware


def _measured(rows: Sequence[Row], curve: _Curve, styles: dict[str, Style]) -> list[Line]:
    runs: dict[tuple[str, Size, str], list[Row]] = defaultdict(list)
    for row in rows:
        runs[row["system"], size_of(row), row["run"]].append(row)
    lines = []
    for (system, size, _), mine in sorted(runs.items()):
        mine.sort(key=lambda row: row["decode_tokens"])
        sizes = sorted({other for name, other, _ in runs if name == system})
        label = f"{system}, {size.label}" if size.kind else system
        values = [(curve.value(row) or 0.0) / curve.unit for row in mine]
        ends = [[row[name] for row in mine] for name in curve.quartiles or ()]
        if not ends or None in ends[0] + ends[1]:
            ends = [[], []]
        lines.append(
            Line(
                label=label,
                style=variant(styles[system], sizes.index(size)),
                kind="curve",
                x=[float(row["decode_tokens"]) for row in mine],
                y=values,
                low=ends[0],
                high=ends[1],
                hover=[
                    f"{label}\n{value:,.3g} at {row['decode_tokens']:,} tokens"
                    + ("\nfilled with made-up keys" if row["fast_forwarded"] else "")
                    for row, value in zip(mine, values, strict=True)
                ],
            )
        )
    return lines
