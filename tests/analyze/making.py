"""Traces that are easy to count: written by hand, or recorded from a small random model."""

import numpy as np
import torch

from longthink.lab.analyze.recorder import Prompt, record
from longthink.lab.analyze.store import PROMPT, Header, Trace, TraceStore, TraceWriter
from tests.models import build


class Words:
    """A tokenizer that says ``w7`` for token 7."""

    def decode(self, ids, **_):
        return " ".join(f"w{i}" for i in ids)


def recorded(folder, architecture="qwen2", prompt=9, new=32, problems=1, seed=0, **options) -> TraceStore:
    """Traces of a random model."""
    model = build(architecture, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        Prompt(
            task="made",
            problem=str(i),
            inputs={"input_ids": torch.randint(3, 97, (1, prompt), generator=generator)},
            max_new_tokens=new,
        )
        for i in range(problems)
    ]
    return record(model, Words(), prompts, folder, **{"top": 0} | options)


def written(path, attention_LHTN, prompt, *, kv_heads=None, page_size=1, texts=None, image=()) -> Trace:
    """A trace of given attention: row t is the token at ``prompt + t``, columns are pages."""
    layers, heads, steps, _ = attention_LHTN.shape
    with TraceWriter(path, vectors=False) as writer:
        for layer in range(layers):
            none = {"counts": np.zeros(kv_heads or heads, np.int32), "pages": np.zeros(0, np.int32)}
            rest = np.zeros(kv_heads or heads, np.float16)
            writer.add(PROMPT, layer, **none, mass=np.zeros(0, np.float16), rest=rest)
        writer.flush()
        for t in range(steps):
            for layer in range(layers):
                mass_HN = attention_LHTN[layer, :, t].astype(np.float16)
                writer.add(
                    prompt + t,
                    layer,
                    counts=(mass_HN > 0).sum(1).astype(np.int32),
                    pages=np.nonzero(mass_HN > 0)[1].astype(np.int32),
                    mass=mass_HN[mass_HN > 0],
                    rest=np.zeros(heads, np.float16),
                )
        tokens = prompt + steps + 1
        writer.close(
            Header(
                task="made", problem=path.stem, prompt_tokens=prompt, token_ids=tuple(range(tokens)),
                texts=tuple(texts or (f"w{i}" for i in range(tokens))), image=tuple(image), layers=layers,
                heads=heads, kv_heads=kv_heads or heads, head_dim=4, scaling=0.5, page_size=page_size, top=0,
                vectors=False,
            )
        )  # fmt: skip
    return Trace.open(path)


def dense(trace) -> np.ndarray:
    """Recorded attention as one array, M x T x pages."""
    header = trace.header
    found = np.zeros((header.layers * header.heads, len(header.steps), header.pages))
    for step in trace.steps():
        found[step.head, step.now - header.prompt_tokens, step.page] = step.mass
    return found
