"""Grading: the answer in a text, and whether it is right."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Self

from longthink.config import check_int, check_range
from longthink.errors import GraderError, needs_extra
from longthink.lab.evaluate.answers import parts_to_read, stated_answer
from longthink.lab.evaluate.tasks import Item
from longthink.reasoner.task import final_value

MAX_ANSWER = 1000
"""Characters of an answer or a gold answer that computer algebra gets; longer ones only compare as text."""
TAIL = 1000
"""Characters at the end of a text in which words such as "the answer is" are looked for."""

_START_S = 120.0
_EXIT_S = 5.0
# What may differ between two ways to write the same words: spacing and sizing commands, "$", a final full stop.
_STYLE = re.compile(r"\\(?:left|right|displaystyle|,|!|;|:| )|[\s$]|\.$")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What grading says of a text.

    Attributes
    ----------
    answer
        The answer found, None if there is none.
    correct
        Whether it is right.
    note
        Why an answer could not be judged and counts as wrong, None where it could.
    """

    answer: str | None
    correct: bool
    note: str | None = None


class Grader:
    """Grades texts, in a process of its own that is started when it is needed and again when it fails.

    Use it in a ``with`` block, from one thread at a time. Equality is decided by math-verify.

    Parameters
    ----------
    seconds
        Wall-clock time for one answer; what takes longer counts as wrong (seconds).
    memory_mib
        Address space of the process (MiB); what takes more counts as wrong.

    Raises
    ------
    ValueError
        If a limit is out of range.
    """

    def __init__(self, *, seconds: float = 10.0, memory_mib: int = 2048) -> None:
        check_range("seconds", seconds, 0.01)
        check_int("memory_mib", memory_mib, 256)
        self._seconds = seconds
        self._memory_mib = memory_mib
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def grade(self, item: Item, text: str, *, exact: bool) -> Verdict:
        r"""Find the answer in what a model wrote, and judge it.

        Looked at are what follows the last ``</think>``, then the whole text; in each the last ``\boxed{}``, else a
        line ``#### 18`` or ``A: 18``. Where there is none, the end of the text is searched for "the answer is".

        Parameters
        ----------
        item
            The problem.
        text
            What the model wrote after the prompt.
        exact
            Whether it is a built-in problem: its text must end with the very words of the gold answer.

        Raises
        ------
        MissingExtraError
            If math-verify is not installed.
        GraderError
            If the process cannot be started.
        """
        if exact:
            answer = final_value(text)
            return Verdict(answer=answer, correct=answer == item.gold)
        # Half of a surrogate pair could not be stored, nor can any gold answer have it.
        parts = parts_to_read(text.encode(errors="replace").decode())
        answer = next(filter(None, map(stated_answer, parts)), None)
        if answer is not None:
            if _plain(answer) == _plain(item.gold):
                return Verdict(answer=answer, correct=True)
            if max(len(answer), len(item.gold)) > MAX_ANSWER:
                return Verdict(
                    answer=answer[:MAX_ANSWER], correct=False, note=f"longer than {MAX_ANSWER} characters"
                )
        return self._ask({"answer": answer, "text": parts[0][-TAIL:], "gold": item.gold})

    def close(self) -> None:
        """End the process. The next answer starts another."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None and process.stdout is not None
        process.kill()
        process.wait(_EXIT_S)
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # what it had not read is of no use any more
            process.stdin.close()

    # The process ----------------------------------------------------------------------------------------------

    def _ask(self, request: dict[str, str | None]) -> Verdict:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            reply = self._receive(self._seconds)
        except BrokenPipeError:
            reply = None
        except TimeoutError:
            self.close()
            return Verdict(
                answer=request["answer"],
                correct=False,
                note=f"grading took longer than {self._seconds:g} s",
            )
        except BaseException:
            self.close()  # An interrupted answer must not be taken for the next one.
            raise
        if reply is None:
            self.close()
            return Verdict(answer=request["answer"], correct=False, note="grading ended its process")
        return Verdict(**reply)

    def _start(self) -> None:
        with needs_extra("eval"):
            if find_spec("math_verify") is None:  # imported by the process, not by this one
                raise ModuleNotFoundError(name="math_verify")
        # -P: a file sympy.py in the current folder is no library.
        command = [sys.executable, "-P", "-m", "longthink.lab.evaluate.grader_process"]
        self._buffer = b""
        self._process = subprocess.Popen(
            [*command, str(self._seconds), str(self._memory_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            ready = self._receive(_START_S)
        except BaseException:
            self.close()
            raise
        if ready is None:
            code = self._process.wait(_EXIT_S)
            self.close()
            raise GraderError(
                f"the process that grades answers ended at its start (exit code {code}); "
                f"it may have needed more than memory_mib={self._memory_mib}"
            )

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """Return the next reply, or None if the process has ended; TimeoutError if it takes too long."""
        assert self._process is not None and self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                data = os.read(self._process.stdout.fileno(), 65536)
                if not data:
                    return None
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply


def _plain(answer: str) -> str:
    """Return an answer without what makes no difference, for comparison as text."""
    return _STYLE.sub("", answer.replace("dfrac", "frac").replace("tfrac", "frac"))
