"""The process that compares answers: ``python -m longthink.lab.evaluate.grader_process SECONDS MIB``.

Computer algebra on model output may hang, exhaust memory or crash the interpreter; here it harms nothing else.
"""

import contextlib
import signal
import sys
from typing import Any

from longthink.lab.processes import Parent, serve

_ORPHAN_S = 5.0  # time for the parent to kill a stuck process before it ends itself (seconds)
_NUMERALS = frozenset(
    "half third quarter dozen hundred thousand million billion trillion percent percentage factorial squared cubed "
    "times plus minus over divided mod and".split()
)


def compare(answer: str, gold: str) -> bool:
    from math_verify import verify

    # Its own time limits use signals and let the computation go on.
    return bool(verify(_parsed(gold), _parsed(without_unit(answer)), timeout_seconds=None))


def find(text: str) -> str | None:
    """Return the answer that a text announces with words such as "the answer is", or None."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    latex = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=-1)
    configs = (latex, ExprExtractionConfig(try_extract_without_anchor=False))
    found = parse(text, extraction_config=configs, parsing_timeout=None)
    # The expression comes before the text that it was read from.
    return next((part.strip() for part in reversed(found) if isinstance(part, str)), None)


def without_unit(answer: str) -> str:
    """Return ``18`` for ``18 dollars``: algebra would read words as variables. Numerals and short words stay."""
    number, _, words = answer.strip().partition(" ")
    names = words.lower().split()
    unit = bool(names) and all(len(name) > 2 and name.isalpha() and name not in _NUMERALS for name in names)
    return number if unit and number[-1:].isdigit() else answer


def _parsed(answer: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    return parse(f"\\boxed{{{answer}}}", extraction_config=configs, parsing_timeout=None)


def _work(parent: Parent) -> None:
    seconds, mib = float(sys.argv[1]), int(sys.argv[2])
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (mib * 2**20, mib * 2**20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compare("1", "1")  # imports and builds everything before the clock of the first answer starts
    find("the answer is 1")
    parent.send("ready")
    while True:
        request = parent.receive()
        # Algebra may hold the interpreter's lock for good, and the closing of the input would go unnoticed.
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds + _ORPHAN_S)
        answer = request["answer"] or find(request["text"])
        parent.send([answer, answer is not None and compare(answer, request["gold"])])
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    serve(_work)
