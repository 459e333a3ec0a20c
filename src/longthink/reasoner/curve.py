"""The loss curve of a run."""

from __future__ import annotations

import json
from pathlib import Path


def plot_curve(metrics: Path, target: Path) -> None:
    """Draw loss and longest problem over tokens, from a run's ``metrics.jsonl``, as a PNG.

    Raises
    ------
    ImportError
        Without matplotlib (the extra ``longthink[plot]``).
    """
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    tokens = [record["tokens"] / 1e6 for record in records]
    figure = Figure(figsize=(7, 4), layout="constrained")
    loss = figure.subplots()
    loss.semilogy(tokens, [record["loss"] for record in records], color="C0", linewidth=0.8)
    loss.set_xlabel("tokens (millions)")
    loss.set_ylabel("loss of the batch", color="C0")
    longest = loss.twinx()
    longest.step(tokens, [record["longest"] for record in records], color="C1", where="post")
    longest.set_ylabel("longest problem (lines)", color="C1")
    figure.savefig(target, dpi=150)
