"""``longthink trace``: record what a model reads while it reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longthink.cli.models import load_model
from longthink.cli.progress import progress
from longthink.cli.terminal import write_text
from longthink.cli.text import size_text, visible
from longthink.lab.cli.analyze_options import Model, Problems, Recording

if TYPE_CHECKING:
    from longthink.lab.analyze.recorder import Prompt
    from longthink.lab.analyze.store import TraceStore
    from longthink.models import Loaded

_PROBLEMS, _MODEL, _RECORDING = Problems(), Model(), Recording()


def trace(*, problems: Problems = _PROBLEMS, model: Model = _MODEL, recording: Recording = _RECORDING) -> int:
    """Record which tokens every head reads in every step, while the model solves problems with a dense cache.

    After an interruption, the same command continues with the unfinished problem.
    """
    store = record_traces(problems, recording, load_model(model))
    rows = [
        f"{visible(one.header.task)} {visible(one.header.problem)}: {len(one.header.token_ids):,} tokens, "
        f"{size_text(one.path.stat().st_size)}"
        for one in store.traces()
    ]
    write_text("\n".join([*rows, f"{len(rows)} traces in {visible(str(store.folder))}"]) + "\n")
    return 0


def record_traces(problems: Problems, recording: Recording, loaded: Loaded) -> TraceStore:
    from longthink.lab.analyze.recorder import record

    total = 0
    with progress("recording", unit="tokens") as task:

        def on_step(prompt: Prompt, tokens: int) -> None:
            nonlocal total
            total += 1
            task.advance_to(total, f"{prompt.task} {prompt.problem}: {tokens}")

        return record(
            loaded.model, loaded.tokenizer, problems.prompts(loaded), recording.out.expanduser(),
            page_size=recording.page_size, top=recording.top, vectors=recording.with_vectors,
            name=loaded.name, describe=loaded.describe() | {"revision": loaded.revision}, on_step=on_step,
        )  # fmt: skip
