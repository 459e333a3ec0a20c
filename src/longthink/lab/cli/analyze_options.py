"""Options shared by the commands that analyse attention. Annotations are objects: see `longthink.cli.options`."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from longthink.cli.options import ModelOptions, Switch, words
from longthink.cli.terminal import note
from longthink.lab.analyze.rules import Rules
from longthink.models import REASONER

if TYPE_CHECKING:
    from longthink.lab.analyze.recorder import Prompt
    from longthink.models import Loaded

Files = Annotated[list[Path] | None, Parameter(negative="")]  # files, each with a flag of its own
_RULES = ", ".join(f"{name}={value}" for name, value in asdict(Rules()).items())
_HELP = f"TOML or YAML file with the thresholds of page classes [default: {_RULES}]."
Classes = Annotated[Path | None, Parameter(help=_HELP)]


@Parameter(name="*", group=Group("Model", sort_key=2))
@dataclass(frozen=True, kw_only=True)
class Model(ModelOptions):
    model: str = REASONER
    """Hub id or local folder; "reasoner" is the built-in model."""
    device: str = "auto"
    """Such as cpu or cuda:1; auto takes the first accelerator."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format."""


@Parameter(name="*", group=Group("Problems", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class Problems:
    tasks: str = "reasoner"
    """gsm8k, math500, aime24, aime25, aime, reasoner/SIZE/PROFILE, or the name of a file given with --data."""
    data: Files = None
    """Problem file (.jsonl, .parquet); repeatable."""
    count: Annotated[int, Parameter(name=("--count", "-n"))] = 2
    """Problems per task."""
    seed: int = 0
    """First seed of built-in problems."""
    max_new_tokens: int | None = None
    """Token limit [default: each task's own]."""

    @property
    def names(self) -> list[str]:
        return words(self.tasks)

    def prompts(self, loaded: "Loaded") -> "Iterator[Prompt]":
        """Yield the problems as prompts for the model; skip those that its context has no room for."""
        import torch

        from longthink.lab.analyze.recorder import Prompt
        from longthink.lab.evaluate.tasks import load_tasks, prompt_ids

        for task in load_tasks(self.names, data=self.data or (), count=self.count, seed=self.seed):
            for item in task.items:
                ids = prompt_ids(item, loaded.tokenizer)
                limit = self.max_new_tokens or task.max_new_tokens
                if loaded.context is not None:
                    limit = min(limit, loaded.context - len(ids))
                if limit < 1:
                    note(f"skipped: {task.name} {item.id} does not fit in the model's context")
                    continue
                inputs = {"input_ids": torch.tensor([ids])}
                yield Prompt(task=task.name, problem=item.id, inputs=inputs, max_new_tokens=limit)


@Parameter(name="*", group=Group("Recording", sort_key=3))
@dataclass(frozen=True, kw_only=True)
class Recording:
    page_size: int = 1
    """Tokens per page, 1 to 32."""
    top: int = 64
    """Pages stored per head and step; 0: all."""
    with_vectors: Switch = False
    """Also store queries, keys and values (for some policies)."""
    out: Path = Path("traces")
    """Folder of the traces; it is extended."""


def read_rules(path: Path | None) -> Rules:
    if path is None:
        return Rules()
    from longthink.lab.evaluate.settings import read_settings

    return Rules(**read_settings(path.expanduser(), [field.name for field in fields(Rules)]))
