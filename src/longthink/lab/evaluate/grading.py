"""Grading: find the answer in a text and decide whether it is right."""

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec

from longthink.config import check_int, check_range
from longthink.errors import GraderError, needs_extra
from longthink.lab.evaluate.answers import parts_to_read, stated_answer
from longthink.lab.evaluate.files import Item
from longthink.lab.processes import Child, ChildDied
from longthink.reasoner.task import final_value

MAX_ANSWER = 1000  # characters that computer algebra gets; longer answers are compared as text only
TAIL = 1000  # characters at the end of a text that are searched for phrases such as "the answer is"

_START_S = 120.0
_FIRST_WORD = re.compile(r"\W*(\w+)")
# Differences without meaning: spacing and sizing commands, "$", a final full stop.
_STYLE = re.compile(r"\\(?:left|right|displaystyle|,|!|;|:| )|[\s$]|\.$")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer found (None if there is none), whether it is right, and why if it could not be judged."""

    answer: str | None
    correct: bool
    note: str | None = None


class Grader(AbstractContextManager["Grader"]):
    """Grades texts with math-verify in a child process, which is replaced when it fails or exceeds a limit."""

    def __init__(self, *, seconds: float = 10.0, memory_mib: int = 2048) -> None:
        check_range("seconds", seconds, 0.01)
        check_int("memory_mib", memory_mib, 256)
        self._seconds, self._memory_mib = seconds, memory_mib
        self._child: Child | None = None

    def __exit__(self, *exception: object) -> None:
        self.close()

    def grade(self, item: Item, text: str) -> Verdict:
        r"""Find the answer in what a model wrote after the prompt, and judge it.

        The text after the last ``</think>`` is searched first, then the whole text; in each the last ``\boxed{}``,
        else a line ``#### 18`` or ``A: 18``; without one, the end of the text for "the answer is". The text of a
        built-in problem must end with the exact words of the gold answer, and its first word must be the gold answer
        in the task ``fact``.
        """
        if item.distance is not None:
            begun = _FIRST_WORD.match(text)
            answer = begun and begun[1]
            return Verdict(answer=answer, correct=answer == item.gold)
        if item.is_builtin:
            answer = final_value(text)
            return Verdict(answer=answer, correct=answer == item.gold)
        # Half of a surrogate pair could not be stored, and no gold answer contains one.
        parts = parts_to_read(text.encode(errors="replace").decode())
        answer = next(filter(None, map(stated_answer, parts)), None)
        if answer is not None:
            if _plain(answer) == _plain(item.gold):
                return Verdict(answer=answer, correct=True)
            if max(len(answer), len(item.gold)) > MAX_ANSWER:
                note = f"longer than {MAX_ANSWER} characters"
                return Verdict(answer=answer[:MAX_ANSWER], correct=False, note=note)
        return self._ask(answer, parts[0][-TAIL:], item.gold)

    def close(self) -> None:
        if self._child is not None:
            child, self._child = self._child, None
            child.close()

    def _ask(self, answer: str | None, text: str, gold: str) -> Verdict:
        child = self._child = self._child or self._start()
        try:
            child.send({"answer": answer, "text": text, "gold": gold})
            found, correct = child.receive(self._seconds)
            return Verdict(answer=found, correct=correct)
        except TimeoutError:
            note = f"grading took longer than {self._seconds:g} s"
        except BaseException as error:
            self.close()  # an answer that was interrupted must not be taken for the next one
            if not isinstance(error, Exception):
                raise
            note = "grading ended its process"
        self.close()
        return Verdict(answer=answer, correct=False, note=note)

    def _start(self) -> Child:
        with needs_extra("eval"):
            if find_spec("math_verify") is None:  # the child imports it
                raise ModuleNotFoundError(name="math_verify")
        limits = (str(self._seconds), str(self._memory_mib))
        child = Child("longthink.lab.evaluate.grader_process", *limits, quiet=True)
        try:
            child.receive(_START_S)
        except ChildDied as death:
            child.close()
            raise GraderError(
                f"the process that grades answers ended at its start ({death}); "
                f"it may have needed more than memory_mib={self._memory_mib}"
            ) from None
        except BaseException:
            child.close()
            raise
        return child


def _plain(answer: str) -> str:
    return _STYLE.sub("", answer.replace("dfrac", "frac").replace("tfrac", "frac"))
