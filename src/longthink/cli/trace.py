"""``longthink trace``: record what a model reads while it thinks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from longthink.cli.models import load_model
from longthink.cli.options import ModelOptions, Switch
from longthink.cli.progress import progress
from longthink.cli.terminal import note, size_text, visible, write_text

if TYPE_CHECKING:
    from longthink.analyze import Prompt, TraceStore
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

    def prompts(self, loaded: Loaded) -> Iterator[Prompt]:
        """Yield the problems as prompts for the model."""
        import torch

        from longthink.analyze import Prompt
        from longthink.evaluate.tasks import load_tasks

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


_DEFAULTS = TraceOptions()


def trace(*, options: TraceOptions = _DEFAULTS) -> int:
    """Record which tokens every head reads in every step, while the model solves problems with a dense cache.

    Give the same command again after an interruption, and it goes on with the problem it was at.
    """
    store = record_traces(options, load_model(options))
    rows = [
        f"{visible(one.header.task)} {visible(one.header.problem)}: {len(one.header.token_ids):,} tokens, "
        f"{size_text(one.path.stat().st_size)}"
        for one in store.traces()
    ]
    write_text("\n".join([*rows, f"{len(rows)} traces in {visible(str(store.folder))}"]) + "\n")
    return 0


def record_traces(options: TraceOptions, loaded: Loaded) -> TraceStore:
    """Record what is not there yet."""
    from longthink.analyze import record

    with progress("recording", unit="tokens") as task:
        total: dict[str, Any] = {"before": 0, "problem": None, "last": 0}

        def on_step(prompt: Prompt, tokens: int) -> None:
            if total["problem"] is not prompt:
                total["before"], total["problem"] = total["before"] + total["last"], prompt
            total["last"] = tokens
            task.advance_to(total["before"] + tokens, f"{prompt.task} {prompt.problem}: {tokens}")

        return record(
            loaded.model,
            loaded.tokenizer,
            options.prompts(loaded),
            options.out.expanduser(),
            page_size=options.page_size,
            top=options.top,
            vectors=options.with_vectors,
            name=loaded.name,
            describe=loaded.describe() | {"revision": loaded.revision},
            on_step=on_step,
        )
