"""One style per policy in all figures: the colours of Okabe and Ito, which colour-blind readers can tell apart.

Marker and dashes differ too, so that no figure depends on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

FOREGROUND = "#111111"
"""Text and axes; on a page it follows the page's own text colour."""
GRID = "#dddddd"

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
    "recall": "#111d8c",
    "openvino f32": "#2f4f6f",
    "openvino f32 eviction": "#1f9e89",
    "openvino u8": "#6a8caf",
    "openvino u8 eviction": "#79b473",
    "kvpress decoding": "#a0522d",
    "byte floor": FOREGROUND,
    "belady": "#b5495b",
    "optimum": FOREGROUND,
    "keydiff": "#3a7d44",
    "r_kv": "#c2185b",
    "snapkv": "#00838f",
    "tova": "#6d4c41",
    "lazy_eviction": "#4b8b3b",
    "tri_attention": "#2e5fa3",
    "vase": "#9c2f4f",
}
_SPARE = ("#6b8e23", "#b03060", "#4f7f8f")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Style:
    """Colour, marker and dashes of a line, as matplotlib names them."""

    colour: str
    marker: str
    dash: str

    def with_dash(self, number: int) -> Style:
        """Return the style of a further line of the same colour and marker, such as a second budget."""
        return replace(self, dash=_DASHES[(_DASHES.index(self.dash) + number) % len(_DASHES)])


def make_styles(names: Iterable[str]) -> dict[str, Style]:
    """Return a style for each name, which is a policy's specification or the name of a system.

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
        # A dashed line is Dense's.
        dashes = _DASHES[1:] if base == "dense" else _DASHES
        styles[name] = Style(
            colour, _MARKERS[(known + variant) % len(_MARKERS)], dashes[variant % len(dashes)]
        )
    return styles
