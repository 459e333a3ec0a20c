"""The attention page's pictures as PNG and PDF files: lives of pages over time, and the grid of heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longthink.lab.analyze.lives import Lives, MapClass, PageClass, map_classes
from longthink.lab.analyze.replays import Replay
from longthink.lab.analyze.store import Trace
from longthink.lab.report.attention_view import MAP_NAMES, read_uses, replay_label
from longthink.lab.report.escape import for_matplotlib

_COLOURS = {
    PageClass.LAZY: "#c9ccd1",
    PageClass.SINK: "#8c8f94",
    PageClass.LOCAL: "#a9bfd0",
    PageClass.PHOENIX: "#d9730d",
    PageClass.MILESTONE: "#1769aa",
}
_MAP_COLOURS = {
    MapClass.SINK_LIKE: "#8c8f94",
    MapClass.MILESTONE: "#1769aa",
    MapClass.PHOENIX: "#d9730d",
    MapClass.MIXED: "#c9ccd1",
}
_LOST = "#d11f3a"


def save_attention_figures(
    shown: Sequence[tuple[Trace, Lives]], all_lives: Sequence[Lives], replays: Sequence[Replay], folder: Path
) -> None:
    """Write ``lives-N`` for each trace shown (with evictions under the first policy replayed on it) and ``heads``."""
    from matplotlib.figure import Figure as Canvas

    folder.mkdir(parents=True, exist_ok=True)
    for number, (trace, lives) in enumerate(shown, start=1):
        key = (trace.header.task, trace.header.problem)
        mine = [one for one in replays if one.key[:2] == key and not one.note]
        canvas = Canvas(figsize=(7.2, 5.6), layout="constrained")
        _draw_lives(canvas.subplots(), trace, lives, mine[0] if mine else None)
        _save(canvas, folder / f"lives-{number}")
    header = shown[0][1].header
    canvas = Canvas(
        figsize=(1.6 + 0.42 * max(4, header.heads), 1.4 + 0.34 * header.layers), layout="constrained"
    )
    _draw_heads(canvas.subplots(), all_lives)
    _save(canvas, folder / "heads")


def _save(canvas: Any, path: Path) -> None:
    # No date inside: the same traces give the same files.
    canvas.savefig(path.with_suffix(".png"), dpi=200, metadata={"Software": None})
    canvas.savefig(path.with_suffix(".pdf"), dpi=300, metadata={"CreationDate": None})


def _draw_lives(axes: Any, trace: Trace, lives: Lives, replay: Replay | None) -> None:
    header, uses = trace.header, read_uses(trace, lives)
    pages = np.arange(header.pages)
    gone = np.full((1, header.pages), -1)
    if replay is not None and replay.gone_LKN.size:
        gone = replay.gone_LKN.reshape(-1, header.pages)
    ends = np.sort(np.where(gone < 0, header.steps.stop, gone), axis=0)
    # Held by some table, and by all.
    for end, alpha in ((ends[-1], 0.45), (ends[0], 1.0)):
        axes.fill_betweenx(pages, lives.birth_P, end, color="#e6e9ed", alpha=alpha, step="mid", linewidth=0)
    table = uses["map"] * len(gone) // (header.layers * header.heads)
    lost = (gone[table, uses["page"]] >= 0) & (uses["step"] >= gone[table, uses["page"]])
    look: dict[str, Any] = {"linewidths": 0, "rasterized": True}
    for kind in (PageClass.SINK, PageClass.LOCAL, PageClass.PHOENIX, PageClass.MILESTONE):
        mine = (uses["kind"] == kind) & ~lost
        if mine.any():
            axes.scatter(
                uses["step"][mine],
                uses["page"][mine],
                color=_COLOURS[kind],
                label=kind.name.lower(),
                s=2 if kind < PageClass.PHOENIX else 6,
                **look,
            )
    if lost.any():
        axes.scatter(
            uses["step"][lost], uses["page"][lost], color=_LOST, label="used after eviction", s=6, **look
        )
    axes.set_xlim(header.prompt_tokens, header.steps.stop)
    axes.set_ylim(header.pages, 0)
    axes.axhline(header.prompt_tokens / header.page_size, color="#5d6369", linewidth=0.6)
    axes.set_xlabel("step (position of the reading token)", fontsize="small")
    axes.set_ylabel(
        "token" if header.page_size == 1 else f"page of {header.page_size} tokens", fontsize="small"
    )
    under = f"under {replay_label(replay)}" if replay is not None else "everything kept"
    axes.set_title(for_matplotlib(f"{header.task} {header.problem}, {under}"), fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize="x-small")
    axes.legend(loc="lower left", fontsize="x-small", markerscale=3, frameon=False)


def _draw_heads(axes: Any, all_lives: Sequence[Lives]) -> None:
    """What each head is in most problems."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    header = all_lives[0].header
    counts = sum(np.eye(len(MapClass), dtype=int)[map_classes(lives)] for lives in all_lives)
    grid = np.argmax(counts, 1).reshape(header.layers, header.heads)
    colours = ListedColormap([_MAP_COLOURS[kind] for kind in MapClass])
    axes.pcolormesh(
        grid, cmap=colours, vmin=-0.5, vmax=len(MapClass) - 0.5, edgecolors="white", linewidth=1.5
    )
    axes.set_xticks(np.arange(header.heads) + 0.5, labels=range(header.heads))
    axes.set_yticks(np.arange(header.layers) + 0.5, labels=range(header.layers))
    axes.invert_yaxis()
    if len(all_lives) > 1:
        axes.set_title(f"most frequent class in {len(all_lives)} problems", fontsize="small")
    axes.set_xlabel("query head", fontsize="small")
    axes.set_ylabel("layer", fontsize="small")
    patches = [
        Patch(color=_MAP_COLOURS[kind], label=name) for kind, name in zip(MapClass, MAP_NAMES, strict=True)
    ]
    axes.figure.legend(
        handles=patches, loc="outside lower center", ncols=2, fontsize="x-small", frameon=False
    )
    axes.tick_params(labelsize="x-small")
    axes.spines[:].set_visible(False)
