"""One look for each policy in all figures: colours of Okabe and Ito, which colour-blind readers can tell apart.

Marker and dashes differ too, so that no figure depends on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

_COLOURS = {
    "dense": "#808080",
    "raas": "#d55e00",
    "quest": "#009e73",
    "h2o": "#cc79a7",
    "streaming_llm": "#0072b2",
    "recency": "#56b4e9",
    "random": "#e69f00",
    "fifo": "#a89a00",  # Okabe and Ito's yellow, darkened to be seen on white
    "hf static": "#8c6d46",
    "hf dynamic": "#8577d0",
    "hf static compiled": "#b5495b",
    "milestone": "#7b5ea7",
    "openvino f32": "#2f4f6f",
    "openvino f32 eviction": "#1f9e89",
    "openvino u8": "#6a8caf",
    "openvino u8 eviction": "#79b473",
    "kvpress decoding": "#a0522d",
    "byte floor": "#000000",
    "belady": "#b5495b",
    "optimum": "#111111",
}
_SPARE = ("#6b8e23", "#b03060", "#4f7f8f")

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Style:
    """How a line and its points look; names are plotly's."""

    colour: str
    symbol: str
    dash: str


def make_styles(names: Iterable[str]) -> dict[str, Style]:
    """Return a style for each name (a policy's text, or a system's).

    A policy's options do not change its colour; variants of one policy differ in dashes and marker.
    """
    styles: dict[str, Style] = {}
    variants: dict[str, int] = {}
    unknown: list[str] = []
    for name in sorted(set(names)):
        base = name.partition(":")[0].partition(" (")[0]
        variant = variants[base] = variants.get(base, -1) + 1
        if base not in _COLOURS and base not in unknown:
            unknown.append(base)
        known = list(_COLOURS).index(base) if base in _COLOURS else len(_COLOURS) + 2 + unknown.index(base)
        colour = _COLOURS.get(base) or _SPARE[unknown.index(base) % len(_SPARE)]
        symbol = SYMBOLS[(known + variant) % len(SYMBOLS)]
        dashes = DASHES[1:] if base == "dense" else DASHES
        styles[name] = Style(colour, symbol, dashes[variant % len(dashes)])
    return styles


def variant(style: Style, number: int) -> Style:
    """Return the style of another line of the same colour and marker, such as a second budget."""
    return replace(style, dash=DASHES[(DASHES.index(style.dash) + number) % len(DASHES)])
