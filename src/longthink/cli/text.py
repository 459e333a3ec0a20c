"""Foreign text made safe to show, and numbers made readable.

Text that comes from a model, a file name or an error message is foreign: on a terminal its control characters could
move the cursor, retitle the window or fake a prompt; in a document they could hide or reorder what it says.
"""

import html
import re

# C0 and C1 controls and DEL; then the bidirectional overrides and isolates, which can show text in another order than
# it is stored. Newline and tab are harmless and stay.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_MARKUP = re.compile(r"([\\`*_\[\]|!])")


def visible(text: str) -> str:
    r"""Replace control characters by a picture (``␛``) or an escape (``\x9b``); newline and tab stay."""
    return _UNSAFE.sub(_picture, text)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"


def one_line(text: str) -> str:
    """Return ``text`` as a single line that is safe to write to a terminal."""
    return visible(" ".join(text.split()))


def for_markdown(text: str) -> str:
    """Return ``text`` as one line of Markdown, or one cell of a table, with its markup and links made inert."""
    return _MARKUP.sub(r"\\\1", html.escape(one_line(text), quote=False))


def size_text(count: float) -> str:
    """Return a number of bytes in readable units: ``262 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    digits = 0 if unit == "B" or count >= 100 else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {unit}"
