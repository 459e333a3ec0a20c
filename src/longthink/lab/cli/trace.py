"""``longthink trace``: record what a model reads while it thinks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longthink.cli.models import load_model
from longthink.cli.progress import progress
from longthink.cli.terminal import size_text, visible, write_text
from longthink.lab.cli.analyze_options import TraceOptions

if TYPE_CHECKING:
    from longthink.lab.analyze import Prompt, TraceStore
    from longthink.models import Loaded

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
    from longthink.lab.analyze import record

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
