"""The demo's picture: which tokens stayed alive, as a PNG file and in the terminal.

Both show decode steps from left to right and logical positions from the bottom up; the darker a token, the more page
tables (layers and KV heads) hold it. The colours are those of the "cividis" map, made for colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longthink.lab.cli.residents import Grid, ResidentLog, pooled

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

EVICTED = "#dcdcdc"
_PROMPT = "#c44e00"
_RAMP = ((0xFD, 0xE7, 0x37), (0xA6, 0x9D, 0x75), (0x57, 0x5C, 0x6D), (0x00, 0x22, 0x4E))
_RAMP_ON_DARK = _RAMP[::-1]
_EVICTED_IN_TERMINAL = (0x3A, 0x3A, 0x3A)
_SHADES = "░▒▓█"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One policy's part of the picture."""

    name: str
    verdict: str
    log: ResidentLog


def save_png(panels: Sequence[Panel], path: Path, *, title: str) -> None:
    """Write the picture to ``path``.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed.
    OSError
        If the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(1.2 + 4.0 * len(panels), 4.8), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colours = mpl.colormaps["cividis_r"].with_extremes(under=EVICTED)
    images = [_draw(axis, panel, colours) for axis, panel in zip(axes, panels, strict=True)]
    positions, steps = _extent(panels)
    for axis in axes:
        axis.set(xlim=(0, steps), ylim=(0, positions), xlabel="decode step (tokens)")
    axes[0].set_ylabel("position in the text (tokens)")
    label = "share of page tables (layer, KV head) holding the token"
    figure.colorbar(images[0], ax=list(axes), label=label, pad=0.01)
    legend = [
        Patch(facecolor=EVICTED, label="evicted everywhere"),
        Patch(facecolor="white", edgecolor="#999999", label="not written yet"),
    ]
    axes[0].legend(handles=legend, loc="upper left", fontsize="small", framealpha=1.0)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, format="png")


def _extent(panels: Sequence[Panel]) -> tuple[int, int]:
    """Return the positions and the decode steps that all panels together span."""
    return max(len(panel.log.share_YX()) for panel in panels), max(panel.log.steps[-1] for panel in panels)


def _draw(axis: Any, panel: Panel, colours: Any) -> Any:
    share_YX = panel.log.share_YX()
    steps, prompt = panel.log.steps, panel.log.prompt
    image = axis.imshow(
        np.ma.masked_invalid(share_YX),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, steps[-1], 0, share_YX.shape[0]),
        cmap=colours,
        vmin=1e-6,
        vmax=1.0,
    )
    axis.axhline(prompt, color=_PROMPT, linewidth=1.2, linestyle="--")
    axis.annotate(
        "prompt", (steps[-1], prompt), (-3, -3), textcoords="offset points", ha="right", va="top",
        color=_PROMPT, fontsize="small", fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
    )  # fmt: skip
    axis.set_title(f"{panel.name}\n{panel.verdict}", fontsize="medium", parse_math=False)
    return image


def render(panels: Sequence[Panel], console: Console, *, rows: int = 18) -> list[Text]:
    """Return the picture as lines of text for ``console``, panels side by side where they fit.

    In colour each character shows two positions (half blocks); without colour each shows one, as a shade.
    """
    from rich.text import Text

    margin = 8
    width = max(18, min(48, (console.width + 2) // len(panels) - margin))
    side_by_side = max(1, (console.width + 2) // (width + margin))
    positions, steps = _extent(panels)
    colour = _has_colour(console)
    lines: list[Text] = []
    for start in range(0, len(panels), side_by_side):
        blocks = []
        for panel in panels[start : start + side_by_side]:
            cells = 2 * rows if colour else rows
            grid = pooled(panel.log, rows=cells, columns=width, positions=positions, steps=steps)[::-1]
            body = (
                [_half_blocks(grid[y : y + 2]) for y in range(0, cells, 2)]
                if colour
                else list(map(_shades, grid))
            )
            blocks.append(_framed(panel, body, positions=positions, steps=steps, width=width))
        lines += [Text("  ").join(parts) for parts in zip(*blocks, strict=True)]
    return [*lines, *_key(colour=colour)]


def _has_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _framed(panel: Panel, body: list[Text], *, positions: int, steps: int, width: int) -> list[Text]:
    """Return one panel: its title, its rows with a position scale, and a step scale."""
    from rich.text import Text

    def title(text: str, style: str) -> Text:
        return Text(f"{'':6}{text[:width]:{width}}", style=style)

    lines = [title(panel.name, "bold"), title(panel.verdict, "")]
    first_prompt_row = len(body) - -(-panel.log.prompt * len(body) // positions)
    for y, cells in enumerate(body):
        mark = positions if y == 0 else 0 if y == len(body) - 1 else ""
        in_prompt = y >= first_prompt_row
        line = Text(f"{mark:>5}").append(
            "┃" if in_prompt else "│", style="dark_orange3" if in_prompt else "dim"
        )
        lines.append(line.append_text(cells))
    scale = f"0{'step':^{width - 1 - len(str(steps))}}{steps}"
    return [*lines, Text(f"{'':5}└{scale}", style="dim")]


def _half_blocks(pair_2X: Grid) -> Text:
    """Return one line of characters, each showing an upper and a lower cell."""
    from rich.style import Style
    from rich.text import Text

    text = Text()
    for upper, lower in zip(*(map(_rgb, cells) for cells in pair_2X), strict=True):
        if upper is None:
            text.append(" " if lower is None else "▄", Style(color=lower))
        else:
            text.append("▀", Style(color=upper, bgcolor=lower))
    return text


def _rgb(share: float) -> Any:
    """Return the rich colour of a cell, None where nothing is written yet."""
    from rich.color import Color

    if np.isnan(share):
        return None
    if share <= 0:
        return Color.from_rgb(*_EVICTED_IN_TERMINAL)
    place = share * (len(_RAMP_ON_DARK) - 1)
    low = min(int(place), len(_RAMP_ON_DARK) - 2)
    pairs = zip(_RAMP_ON_DARK[low], _RAMP_ON_DARK[low + 1], strict=True)
    return Color.from_rgb(*(a + (b - a) * (place - low) for a, b in pairs))


def _shades(cells_X: Grid) -> Text:
    from rich.text import Text

    def shade(share: float) -> str:
        if np.isnan(share):
            return " "
        return "." if share <= 0 else _SHADES[min(int(share * len(_SHADES)), len(_SHADES) - 1)]

    return Text("".join(map(shade, cells_X)))


def _key(*, colour: bool) -> list[Text]:
    """Return the legend."""
    from rich.style import Style
    from rich.text import Text

    axes = Text("      up: position in the text   right: decode step   ").append("┃", style="dark_orange3")
    key = Text("      ")
    if colour:
        key.append("██", Style(color=_rgb(0.0))).append(" evicted   ")
        for share in (0.1, 0.4, 0.7, 1.0):
            key.append("██", Style(color=_rgb(share)))
    else:
        key.append(f". evicted   {_SHADES}")
    return [axes.append(" prompt"), key.append(" held by few ... all page tables (layers x KV heads)")]
