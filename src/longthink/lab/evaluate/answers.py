"""Finding the final answer of a text: boxes, answer lines, and the end of a thinking block."""

import re

# An escaped character is neither a box nor a brace: "\\{" is a printed brace.
_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox|framebox)[ \t]*\{)|\\.|[{}]", re.DOTALL)
# "#### 18" ends a GSM8K solution, "A: 18" one of its graded model solutions.
_ANSWER_LINE = re.compile(r"^[ \t]*(?:####|A:)(.*)$", re.MULTILINE)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_END_OF_THINKING = "</think>"


def last_box(text: str) -> str | None:
    r"""Return what is in the last ``\boxed{...}`` that is closed and not empty; one pass over any text."""
    opened: list[tuple[int, bool]] = []
    last: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        if token["box"]:
            opened.append((token.end(), True))
        elif token[0] == "{":
            opened.append((token.end(), False))
        elif token[0] == "}" and opened:
            start, box = opened.pop()
            # Of nested boxes the innermost counts: it starts last.
            if box and (last is None or start > last[0]) and text[start : token.start()].strip():
                last = start, token.start()
    return None if last is None else text[slice(*last)].strip()


def last_answer_line(text: str) -> str | None:
    found = None
    for line in _ANSWER_LINE.finditer(text):
        found = line[1].strip() or found
    return None if found is None else _THOUSANDS.sub("", found)


def stated_answer(text: str) -> str | None:
    return last_box(text) or last_answer_line(text)


def parts_to_read(text: str) -> list[str]:
    _, end, after = text.rpartition(_END_OF_THINKING)
    return [after, text] if end and after.strip() else [text]
