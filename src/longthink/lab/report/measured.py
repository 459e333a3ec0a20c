"""Figures of measured time and memory against decode length."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longthink.lab.report.cells import Row, Size, size_of
from longthink.lab.report.figures import MIB, Figure, Line, Panel
from longthink.lab.report.style import Style


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """What is drawn of the measurements of one kind; ``quartiles`` are columns, drawn as bars."""

    name: str
    kind: str
    title: str
    y_label: str
    value: Callable[[Row], float | None]
    quartiles: tuple[str, ...] = ()
    caption: str = ""
    x_label: str = "tokens decoded"
    log_y: bool = False


_QUARTILES = ("ms_per_token_low", "ms_per_token_high")
_CURVES = (
    _Curve(
        name="jct", kind="jct", title="Job completion time against decode length",
        y_label="time to this length (s)", value=lambda row: row["seconds"],
    ),
    _Curve(
        name="step-time", kind="jct", title="Time of one token against decode length",
        y_label="time per token (ms, median)", value=lambda row: row["ms_per_token"], quartiles=_QUARTILES,
        caption="Bars: quartiles.",
    ),
    _Curve(
        name="peers", kind="peers", title="Time of one token against context, compared with other libraries",
        y_label="time per token (ms, median)", value=lambda row: row["ms_per_token"], quartiles=_QUARTILES,
        caption="Bars: quartiles. One thread, CPU time, systems measured in turn.",
        x_label="tokens of context after the prompt", log_y=True,
    ),
    _Curve(
        name="memory", kind="memory", title="Memory of the cache against decode length",
        y_label="cache (MiB)", value=lambda row: (row["kv_bytes"] + row["metadata_bytes"]) / MIB,
        caption="Allocated for keys, values and page tables, all rows together.",
    ),
    _Curve(
        name="memory-device", kind="memory", title="Memory of the accelerator", y_label="accelerator (MiB)",
        value=lambda row: row["device_bytes"] and row["device_bytes"] / MIB,
        caption="Allocated, with weights and activations.",
    ),
    _Curve(
        name="memory-process", kind="memory", title="Memory of the process", y_label="process (MiB)",
        value=lambda row: row["rss_bytes"] and row["rss_bytes"] / MIB,
        caption="Resident set, with weights, libraries and activations.",
    ),
)  # fmt: skip


def measurement_figures(rows: Sequence[Row], styles: dict[str, Style]) -> list[Figure]:
    """Return the figures of measured time and memory; a panel for each model, batch and machine."""
    figures = []
    for curve in _CURVES:
        chosen = [row for row in rows if row["kind"] == curve.kind and curve.value(row) is not None]
        by_panel: dict[str, list[Row]] = defaultdict(list)
        for row in chosen:
            by_panel[_setup(row)].append(row)
        caption = curve.caption
        if any(row["fast_forwarded"] for row in chosen):
            caption += " Points whose cache was filled with made-up keys instead of by decoding are labelled."
        if chosen:
            panels = [
                Panel(title=key, lines=_lines(by_panel[key], curve, styles)) for key in sorted(by_panel)
            ]
            figures.append(Figure(
                name=curve.name, section="Memory" if curve.kind == "memory" else "Time", title=curve.title,
                caption=caption.strip(), x_label=curve.x_label, y_label=curve.y_label, log_y=curve.log_y,
                panels=panels,
            ))  # fmt: skip
    batches = [row for row in rows if row["kind"] == "batch"]
    return figures + ([_batch_figure(batches, styles)] if batches else [])


def _setup(row: Row) -> str:
    """Return what measurements must share to be compared: model, batch, prompt and machine."""
    count = "1 row" if row["rows"] == 1 else f"{row['rows']} rows"
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    batch = f"{row['model']}, {row['dtype']}, {count}, prompt of {row['prompt_tokens']} tokens"
    return f"{batch}; {_machine(row['hardware'])}, {threads}"


def _machine(hardware: str) -> str:
    """Return the accelerator or processor that a record names, or the text itself if it is not as expected."""
    try:
        found = json.loads(hardware)
        return str(found.get("accelerator") or found["processor"])
    except (ValueError, KeyError, AttributeError):
        return hardware


def _lines(rows: Sequence[Row], curve: _Curve, styles: dict[str, Style]) -> list[Line]:
    runs: dict[tuple[str, Size, str], list[Row]] = defaultdict(list)
    for row in rows:
        runs[row["system"], size_of(row), row["run"]].append(row)
    lines = []
    for (system, size, _), mine in sorted(runs.items()):
        mine.sort(key=lambda row: row["decode_tokens"])
        sizes = sorted({other for name, other, _ in runs if name == system})
        label = f"{system}, {size.label}" if size.kind else system
        values = [curve.value(row) or 0.0 for row in mine]
        ends = [[row[name] for row in mine] for name in curve.quartiles]
        low, high = ends if ends and None not in ends[0] + ends[1] else ([], [])
        hover = [
            f"{label}\n{value:,.3g} at {row['decode_tokens']:,} tokens"
            + ("\nfilled with made-up keys" if row["fast_forwarded"] else "")
            for row, value in zip(mine, values, strict=True)
        ]
        style = styles[system].with_dash(sizes.index(size))
        x = [float(row["decode_tokens"]) for row in mine]
        lines.append(
            Line(label=label, style=style, kind="curve", x=x, y=values, low=low, high=high, hover=hover)
        )
    return lines


def _batch_figure(rows: Sequence[Row], styles: dict[str, Style]) -> Figure:
    """Return throughput against the memory of keys and values; along a line the batch grows."""
    runs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        runs[row["system"], row["run"].partition("/")[0]].append(row)
    lines = []
    for (system, _), mine in sorted(runs.items()):
        mine.sort(key=lambda row: row["rows"])
        speeds = [row["rows"] * 1000 / row["ms_per_token"] for row in mine]
        hover = [
            f"{system}\n{speed:,.3g} tokens/s, {row['rows']} rows\n{row['kv_bytes'] / MIB:,.0f} MiB"
            for row, speed in zip(mine, speeds, strict=True)
        ]
        x = [row["kv_bytes"] / MIB for row in mine]
        lines.append(Line(label=system, style=styles[system], kind="curve", x=x, y=speeds, hover=hover))
    tokens = sorted({row["prompt_tokens"] + row["decode_tokens"] for row in rows})
    sizes = ", ".join(str(count) for count in sorted({row["rows"] for row in rows}))
    return Figure(
        name="peers-batches",
        section="Time",
        title="Throughput against memory, by batch size",
        caption=f"With {' / '.join(f'{count:,}' for count in tokens)} tokens in each row; along a line the batch "
        f"grows: {sizes} rows.",
        x_label="keys and values (MiB)",
        y_label="tokens per second",
        panels=[Panel(title=f"{rows[0]['model']}; {_machine(rows[0]['hardware'])}", lines=lines)],
    )
