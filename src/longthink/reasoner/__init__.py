"""The built-in reasoning model: a task that needs a long chain of thought, and a small model that solves it.

Making and grading problems is pure Python; torch is imported by the first use of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longthink._lazy import lazy_names
from longthink.reasoner.profiles import PROFILES
from longthink.reasoner.task import SIZES, Problem, Rule, Size, grade, make_problem, make_problems

if TYPE_CHECKING:
    from longthink.reasoner.pretrained import load_reasoner

__all__ = [
    "PROFILES", "SIZES", "Problem", "Rule", "Size", "grade", "load_reasoner", "make_problem", "make_problems",
]  # fmt: skip

__getattr__ = lazy_names(__name__, {"pretrained": ("load_reasoner",)})


def __dir__() -> list[str]:
    return sorted(__all__)
