"""The demo's picture of which tokens stayed alive, as a PNG file and in the terminal.

The shade is the share of page tables that hold the token, in "cividis", a map for colour-blind readers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from longthink.lab.cli.race import Grid, ResidentLog, pooled

_EVICTED, _PROMPT = "#dcdcdc", "#c44e00"
_RAMP_ON_DARK = ((0x00, 0x22, 0x4E), (0x57, 0x5C, 0x6D), (0xA6, 0x9D, 0x75), (0xFD, 0xE7, 0x37))
_EVICTED_ON_DARK, _NOT_WRITTEN = (0x3A, 0x3A, 0x3A), (0, 0, 0)
_FRAME = "dark_orange3"


class Panel(NamedTuple):
    name: str
    verdict: str
    log: ResidentLog


def _extent(panels: Sequence[Panel]) -> tuple[int, int]:
    return max(len(one.log.share_YX()) for one in panels), max(one.log.steps[-1] for one in panels)


def save_png(panels: Sequence[Panel], path: Path, *, title: str) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(1.2 + 4.0 * len(panels), 4.8), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colours = mpl.colormaps["cividis_r"].with_extremes(under=_EVICTED)
    positions, steps = _extent(panels)
    for axis, panel in zip(axes, panels, strict=True):
        share_YX, end, prompt = panel.log.share_YX(), panel.log.steps[-1], panel.log.prompt
        image = axis.imshow(
            np.ma.masked_invalid(share_YX), origin="lower", aspect="auto", interpolation="nearest",
            extent=(0, end, 0, len(share_YX)), cmap=colours, vmin=1e-6, vmax=1.0,
        )  # fmt: skip
        axis.axhline(prompt, color=_PROMPT, linewidth=1.2, linestyle="--")
        axis.annotate(
            "prompt", (end, prompt), (-3, -3), textcoords="offset points", ha="right", va="top", color=_PROMPT,
            fontsize="small", fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
        )  # fmt: skip
        axis.set_title(f"{panel.name}\n{panel.verdict}", fontsize="medium", parse_math=False)
        axis.set(xlim=(0, steps), ylim=(0, positions), xlabel="decode step (tokens)")
    axes[0].set_ylabel("position in the text (tokens)")
    label = "share of page tables (layer, KV head) holding the token"
    figure.colorbar(image, ax=list(axes), label=label, pad=0.01)
    evicted = Patch(facecolor=_EVICTED, label="evicted everywhere")
    empty = Patch(facecolor="white", edgecolor="#999999", label="not written yet")
    axes[0].legend(handles=[evicted, empty], loc="upper left", fontsize="small", framealpha=1.0)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, format="png")


def render(panels: Sequence[Panel], console: Console, *, rows: int = 18) -> list[Text]:
    """Return the picture as lines: two positions a character (half blocks) in colour, else one, as a shade."""
    margin = 8
    width = max(18, min(48, (console.width + 2) // len(panels) - margin))
    side_by_side = max(1, (console.width + 2) // (width + margin))
    positions, steps = _extent(panels)
    in_colour = console.color_system is not None and not console.no_color
    draw, cells = (_half_blocks, 2 * rows) if in_colour else (_shades, rows)
    blocks = []
    for panel in panels:
        grid = pooled(panel.log, rows=cells, columns=width, positions=positions, steps=steps)
        blocks.append(_framed(panel, draw(grid[::-1]), positions, steps))
    rows_of_blocks = [blocks[i : i + side_by_side] for i in range(0, len(blocks), side_by_side)]
    lines = [Text("  ").join(parts) for row in rows_of_blocks for parts in zip(*row, strict=True)]
    axes = Text(f"{'':6}up: position in the text   right: decode step   ").append("┃", _FRAME)
    (samples,) = draw(np.tile([0.0, 0.1, 0.4, 0.7, 1.0], (cells // rows, 1)))
    key = Text.assemble(
        f"{'':6}", samples[:1], " evicted   ", samples[1:], " held by few ... all page tables"
    )
    return [*lines, axes.append(" prompt"), key.append(" (layers x KV heads)")]


def _framed(panel: Panel, body: list[Text], positions: int, steps: int) -> list[Text]:
    width = len(body[0])
    lines = [Text(f"{'':6}{text[:width]:{width}}") for text in (panel.name, panel.verdict)]
    lines[0].stylize("bold")
    first_prompt_row = len(body) - -(-panel.log.prompt * len(body) // positions)
    for y, cells in enumerate(body):
        mark = positions if y == 0 else 0 if y == len(body) - 1 else ""
        frame = ("┃", _FRAME) if y >= first_prompt_row else ("│", "dim")
        lines.append(Text.assemble(f"{mark:>5}", frame, cells))
    scale = f"0{'step':^{width - 1 - len(str(steps))}}{steps}"
    return [*lines, Text(f"{'':5}└{scale}", style="dim")]


def _half_blocks(grid_YX: Grid) -> list[Text]:
    colours = [[_colour(share) for share in cells_X] for cells_X in grid_YX]
    return [
        Text.assemble(*(("▀", Style(color=a, bgcolor=b)) for a, b in zip(upper, lower, strict=True)))
        for upper, lower in zip(colours[::2], colours[1::2], strict=True)
    ]


def _colour(share: float) -> Color:
    ramp = (float(np.interp(3 * share, range(4), channel)) for channel in zip(*_RAMP_ON_DARK, strict=True))
    return Color.from_rgb(*(ramp if share > 0 else _EVICTED_ON_DARK if share == 0 else _NOT_WRITTEN))


def _shades(grid_YX: Grid) -> list[Text]:
    levels = np.minimum(np.nan_to_num(grid_YX) * 4, 3) + 2
    levels = np.where(np.isnan(grid_YX), 0, np.where(grid_YX > 0, levels, 1)).astype(int)
    return [Text("".join(row)) for row in np.array(list(" .░▒▓█"))[levels]]
