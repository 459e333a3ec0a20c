"""The part of a report about fidelity: figures against the bytes held, and one table."""

from collections import defaultdict
from collections.abc import Sequence

from longthink.cli.table import Table
from longthink.lab.fidelity.summary import Summary, summaries
from longthink.lab.report.cells import Row
from longthink.lab.report.figures import MIB, Figure, Line, Panel
from longthink.lab.report.style import Style
from longthink.lab.results.statistics import Interval

_DRAWN = {
    "kl": ("Divergence of the predictions from dense", "KL divergence (nats per token)"),
    "loss": ("Rise of the loss", "loss above dense (nats per token)"),
    "long_loss": ("Rise of the loss on long-range tokens", "loss above dense (nats per token)"),
}

Place = tuple[str, str]
"""Model and source of texts."""


def fidelity_cells(rows: Sequence[Row]) -> dict[Place, list[Summary]]:
    """Return the summaries of each model and source of texts."""
    by_place: dict[Place, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["policy"], row["decode_budget"] or 0, row["budget"] or 0)):
        by_place[f"{row['model']}, {row['dtype']}", row["source"]].append(row)
    return {place: summaries(by_place[place]) for place in sorted(by_place)}


def fidelity_figures(cells: dict[Place, list[Summary]], styles: dict[str, Style]) -> list[Figure]:
    """Return a figure for each measure, with a panel for each model and source."""
    figures = []
    for measure, (title, label) in _DRAWN.items():
        panels = []
        for place, found in cells.items():
            if lines := _lines(found, measure, styles):
                panels.append(Panel(title=", ".join(place), lines=lines))
        if panels:
            figures.append(
                Figure(
                    name=f"fidelity-{measure.replace('_', '-')}", section="Fidelity", title=title,
                    caption="Along a line the budget grows. Bars: 95 % bootstrap interval over texts.",
                    x_label="keys and values held at the end of a text (MiB, mean)", y_label=label,
                    log_y=measure == "kl", panels=panels,
                )
            )  # fmt: skip
    return figures


def _lines(found: Sequence[Summary], measure: str, styles: dict[str, Style]) -> list[Line]:
    by_policy: dict[str, list[tuple[float, Interval, str]]] = defaultdict(list)
    for one in found:
        value: Interval | None = getattr(one, measure)
        # A logarithmic axis has no place for a dense cache's zero.
        if value is not None and (measure != "kl" or value.low > 1e-6):
            hover = f"{one.policy}\n{value.mean:.3f} at {one.kv_bytes / MIB:.2f} MiB, {one.texts} texts"
            by_policy[one.policy].append((one.kv_bytes / MIB, value, hover))
    lines = []
    for policy, points in by_policy.items():
        points.sort(key=lambda point: point[0])
        values = [value for _, value, _ in points]
        lines.append(
            Line(
                label=policy, style=styles[policy], kind="curve", x=[x for x, _, _ in points],
                y=[value.mean for value in values], low=[value.low for value in values],
                high=[value.high for value in values], hover=[hover for _, _, hover in points],
            )
        )  # fmt: skip
    return lines


def fidelity_table(cells: dict[Place, list[Summary]]) -> Table:
    columns = {
        "model": "text", "texts from": "text", "policy": "text", "decode budget": "count", "budget": "count",
        "texts": "count", "tokens": "count", "held MiB": "mib", "dense MiB": "mib", "loss": "formatted",
        "KL": "formatted", "KL minus recency": "formatted", "other top token": "formatted",
        "long-range tokens": "count", "their loss": "formatted", "their KL": "formatted",
    }  # fmt: skip
    rows = [
        [
            *place, one.policy, one.decode_budget, one.budget, one.texts, one.tokens, one.kv_bytes,
            one.dense_kv_bytes, *map(_text, (one.loss, one.kl, one.versus.get("kl"), one.differs)),
            one.long_tokens, _text(one.long_loss), _text(one.long_kl),
        ]
        for place, found in cells.items()
        for one in found
    ]  # fmt: skip
    note = (
        "Beside the dense model, in nats per token, with 95 % bootstrap intervals over texts. Long-range tokens: the "
        "dense model is sure of them, and a window of the same budget is not (docs/fidelity.md)."
    )
    return Table(name="fidelity", title="Fidelity", note=note, columns=columns, rows=rows)


def _text(value: Interval | None) -> str | None:
    return None if value is None else value.text()
