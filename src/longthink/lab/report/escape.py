"""Foreign text made harmless: for HTML, for plotly, for data in a page, for matplotlib and for Markdown.

Texts of models, names of problems, tasks, policies and models may come from anywhere.
"""

from __future__ import annotations

import html
import json
import re
from typing import Any

# Controls have no place in HTML; bidirectional marks would show a text in another order than it has.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DIRECTIONS = re.compile("[\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return the text with controls and direction marks as visible stand-ins; newline and tab stay."""
    text = _CONTROLS.sub(
        lambda match: chr(0x2400 + ord(match[0])) if ord(match[0]) < 0x20 else "\ufffd", text
    )
    return _DIRECTIONS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def for_html(value: object) -> str:
    """Return a value as text for HTML, inside elements and quoted attributes."""
    return html.escape(visible(str(value)))


def for_plotly(text: str) -> str:
    """Return a text that plotly shows as it is: it reads tags and entities in titles and hovers. Lines stay lines."""
    return html.escape(visible(text), quote=False).replace("\n", "<br>")


def for_script(document: Any) -> str:
    """Return JSON that can stand in a ``<script>`` element: nothing in it can close or open one."""
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def for_matplotlib(text: str) -> str:
    """Return a text in which matplotlib sees no formula."""
    return visible(text).replace("$", r"\$")


def for_markdown(value: object) -> str:
    """Return a value as one cell of a Markdown table, without markup and links."""
    text = html.escape(" ".join(visible(str(value)).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|!])", r"\\\1", text)
