"""The built-in reasoning model: a task that needs a long chain of thought, and a small model that solves it.

Making and grading problems is pure Python; the model and its training import torch when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longthink._lazy import lazy_names
from longthink.reasoner.profiles import PROFILES
from longthink.reasoner.task import SIZES, Problem, Rule, Size, grade, make_problem, make_problems

if TYPE_CHECKING:
    from longthink.reasoner.config import TrainConfig
    from longthink.reasoner.pretrained import load_reasoner
    from longthink.reasoner.trainer import TrainResult, export_run, train

__all__ = [
    "PROFILES",
    "SIZES",
    "Problem",
    "Rule",
    "Size",
    "TrainConfig",
    "TrainResult",
    "export_run",
    "grade",
    "load_reasoner",
    "make_problem",
    "make_problems",
    "train",
]

__getattr__ = lazy_names(
    __name__,
    {
        "config": ("TrainConfig",),
        "pretrained": ("load_reasoner",),
        "trainer": ("TrainResult", "export_run", "train"),
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
