"""The process that compares answers: ``python -m longthink.lab.evaluate.grader_process SECONDS MIB``.

Reads one JSON request a line on standard input and writes one JSON reply a line on standard output. Computer algebra
on what a model wrote may take for ever, take all memory or crash the interpreter; here it takes nothing else along.
The process ends by itself when its parent is gone, or when it is stuck and nobody kills it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import Any

_ORPHAN_S = 5.0
"""Seconds that the parent has for killing a stuck process before it ends itself."""
_NUMERALS = frozenset(
    "half third quarter dozen hundred thousand million billion trillion percent percentage factorial squared cubed "
    "times plus minus over divided mod and".split()
)


def compare(answer: str, gold: str) -> bool:
    """Tell whether an answer equals the gold answer, mathematically."""
    from math_verify import verify

    # No time limits of its own: they use signals and let the caller's computation go on.
    return bool(verify(_parsed(gold), _parsed(without_unit(answer)), timeout_seconds=None))


def find(text: str) -> str | None:
    """Return the answer that a text announces by words such as "the answer is", or None."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configs = (
        LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=-1),
        ExprExtractionConfig(try_extract_without_anchor=False),
    )
    found = parse(text, extraction_config=configs, parsing_timeout=None)
    # The expression and the text that it was read from, in this order.
    return next((part.strip() for part in reversed(found) if isinstance(part, str)), None)


def without_unit(answer: str) -> str:
    """Return ``18`` for ``18 dollars``: algebra would take bare words for variables.

    Words that change the number stay, and so do short ones, which may be variables or functions.
    """
    number, _, words = answer.strip().partition(" ")
    names = words.lower().split()
    unit = bool(names) and all(len(name) > 2 and name.isalpha() and name not in _NUMERALS for name in names)
    return number if unit and number[-1:].isdigit() else answer


def _parsed(answer: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    return parse(f"\\boxed{{{answer}}}", extraction_config=configs, parsing_timeout=None)


def _reply(request: dict[str, str]) -> dict[str, Any]:
    answer = request.get("answer") or find(request["text"])
    return {"answer": answer, "correct": answer is not None and compare(answer, request["gold"])}


def main() -> None:
    """Answer requests until standard input ends."""
    seconds, mib = float(sys.argv[1]), int(sys.argv[2])
    # Ctrl-C reaches the whole group; the parent decides what becomes of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limits on some systems
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (mib * 2**20, mib * 2**20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Whatever a library prints must not end up among the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    compare("1", "1")  # Imports and builds everything, outside of the time of the first answer.
    find("the answer is 1")
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds + _ORPHAN_S)
        print(json.dumps(_reply(json.loads(line))), file=replies, flush=True)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
