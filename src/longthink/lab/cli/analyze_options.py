"""Options of the commands that analyse attention, each declared once.

Annotations are real objects here, not strings: see `longthink.cli.options`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from longthink.cli.options import ModelOptions, Switch
from longthink.cli.terminal import note
from longthink.lab.analyze.rules import Rules

if TYPE_CHECKING:
    from longthink.lab.analyze import Prompt
    from longthink.models import Loaded

DEFAULT_OUT = "traces"
"""Folder of the traces unless one is given."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProblemSetOptions(ModelOptions):
    """Which problems a model is to solve."""

    tasks: str = "reasoner"
    """Problem sets, separated by commas: gsm8k, math500, aime24, aime25, aime, reasoner/SIZE/PROFILE, or the name of
    a file given with --data."""

    data: list[Path] | None = None
    """Problem file (.jsonl, .parquet), a task named by its stem; may be given several times."""

    count: Annotated[int, Parameter(name=("--count", "-n"))] = 2
    """Problems of each task."""

    seed: int = 0
    """First seed of built-in problems."""

    max_new_tokens: int | None = None
    """Tokens of a chain of thought at most [default: each task's own limit]."""

    def prompts(self, loaded: "Loaded") -> "Iterator[Prompt]":
        """Yield the problems as prompts for the model."""
        import torch

        from longthink.lab.analyze import Prompt
        from longthink.lab.evaluate.tasks import load_tasks

        names = [name.strip() for name in self.tasks.split(",") if name.strip()]
        for task in load_tasks(names, data=self.data or (), count=self.count, seed=self.seed):
            for item in task.items:
                ids = task.prompt_ids(item, loaded.tokenizer)
                limit = self.max_new_tokens or task.max_new_tokens
                if loaded.context is not None:
                    limit = min(limit, loaded.context - len(ids))
                if limit < 1:
                    note(f"left out: {task.name} {item.id} has no room in the model's context")
                    continue
                inputs = {"input_ids": torch.tensor([ids])}
                yield Prompt(task=task.name, problem=item.id, inputs=inputs, max_new_tokens=limit)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TraceOptions(ProblemSetOptions):
    """Options of ``longthink trace``."""

    page_size: int = 1
    """Tokens in a page of the trace, 1 to 32."""

    top: int = 64
    """Pages stored of each head and step, those with the most attention; 0 stores all."""

    with_vectors: Switch = False
    """Store queries, keys and values too, which some policies look at (small models)."""

    out: Path = Path(DEFAULT_OUT)
    """Folder of the traces. What is in it already is not recorded again."""


RuleOptions = Annotated[Rules, Parameter(name="*")]
"""The numbers in the definitions of use, page and map, an option each."""

RULES = Rules()
"""The definitions where nothing is said."""
