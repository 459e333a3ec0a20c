"""Whether a text can pass for English: what a model writes that has lost its thread does not."""

import re

COMMON = frozenset(
    "a and are as at be by can for from have in into is it of on or that the then this to until we which will with "
    "you your".split()
)
"""Words that make up almost half of ordinary prose, whatever it is about."""


def faults(text: str) -> list[str]:
    """What keeps a text of some 50 tokens from being readable English; nothing if it is."""
    words = re.findall(r"[a-z']+", text.lower())
    if len(words) < 20:
        return [f"{len(words)} words"]
    found = []
    if (share := sum(letter.isascii() for letter in text) / len(text)) < 0.95:
        found.append(f"{share:.0%} of the letters are ASCII")
    if (share := sum(word in COMMON for word in words) / len(words)) < 0.25:
        found.append(f"{share:.0%} of the words are common ones")
    if any(len({*words[i : i + 3]}) == 1 for i in range(len(words) - 2)):
        found.append("a word three times in a row")
    triples = list(zip(words, words[1:], words[2:], strict=False))
    if (share := len({*triples}) / len(triples)) < 0.7:
        found.append(f"{share:.0%} of three words in a row are new")
    return found
