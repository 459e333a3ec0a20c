"""Recording: decode with Dense and store what every head reads in every step.

Shape suffixes: B batch rows (one), K KV heads, G query heads per KV head, H query heads, S token slots, N tokens so
far, P pages, D head dim.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from longthink.config import check_int
from longthink.errors import UnsupportedModelError
from longthink.files import replacing
from longthink.hf import PagedCache, generate
from longthink.hf.layer_kinds import has_pages, library_layers
from longthink.hf.support import check_model
from longthink.lab.analyze.store import CHUNK_STEPS, PROMPT, Header, TraceStore, TraceWriter
from longthink.policies import Dense, PageTable, Step

MAX_PAGE_SIZE = 32
TOP = 64  # default number of pages stored per head and step


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem to record. `inputs` are the model's arguments, for images the output of the processor."""

    task: str
    problem: str
    inputs: Mapping[str, Tensor]
    max_new_tokens: int


class _Tape:
    """Passes what the layers report to the writer; holds at most `CHUNK_STEPS` steps."""

    def __init__(
        self, writer: TraceWriter, page_size: int, top: int, vectors: bool,
        on_step: Callable[[int], None] = lambda tokens: None,
    ) -> None:  # fmt: skip
        self.writer, self.on_step = writer, on_step
        self.page_size, self.top, self.vectors = page_size, top, vectors
        self.kv_heads = self.head_dim = 0
        self.scaling = 1.0
        self._steps = 0

    def prompt(self, layer: int, table: PageTable, mass_BKS: Tensor) -> None:
        tokens = int(table.prompt_B[0])
        found = self._entries(mass_BKS[0, :, :tokens], top=0)
        vectors = {}
        if self.vectors:
            kept = {"key": table.keys_BKSD, "value": table.values_BKSD}
            if table.keys_BKSD.shape[3] != table.values_BKSD.shape[3]:
                raise UnsupportedModelError(
                    "keys and values of different size cannot be stored: omit the vectors"
                )
            vectors = {name: _plain(of[0, :, :tokens]) for name, of in kept.items()}
            vectors["query"] = np.zeros(0, np.float32)
        self.writer.add(PROMPT, layer, **found, **vectors)
        self.kv_heads, self.head_dim = table.keys_BKSD.shape[1], table.keys_BKSD.shape[3]

    def step(self, layer: int, table: PageTable, step: Step) -> None:
        assert step.weights_BKGS is not None
        now = int(table.now_B[0])
        weights_HN = step.weights_BKGS[0, ..., : now + 1].flatten(0, 1)
        vectors = {}
        if self.vectors:
            new = {"key": table.keys_BKSD[0, :, now], "value": table.values_BKSD[0, :, now]}
            vectors = {name: _plain(of) for name, of in ({"query": step.query_BKGD[0]} | new).items()}
        if layer == 0:
            if self._steps % CHUNK_STEPS == 0:  # the chunk before this step is complete in all layers
                self.writer.flush()
            self._steps += 1
            self.on_step(self._steps)
        self.writer.add(now, layer, **self._entries(weights_HN, top=self.top), **vectors)
        self.scaling = step.scaling

    def _entries(self, mass_HN: Tensor, top: int) -> dict[str, NDArray[Any]]:
        """Return the `top` pages of each head by mass (0: all), and the mass of the rest."""
        mass_HP = mass_HN.float()
        if self.page_size > 1:
            mass_HP = pad(mass_HP, (0, -mass_HP.shape[1] % self.page_size))
            mass_HP = mass_HP.unflatten(-1, (-1, self.page_size)).sum(-1)
        kept_HP = torch.ones_like(mass_HP, dtype=torch.bool)
        if 0 < top < mass_HP.shape[1]:
            kept_HP = torch.zeros_like(kept_HP).scatter_(1, mass_HP.topk(top).indices, True)
        rest_H = mass_HP.masked_fill(kept_HP, 0).sum(1)
        half_HP = mass_HP.half()
        kept_HP &= half_HP > 0
        return {
            "counts": kept_HP.sum(1, dtype=torch.int32).cpu().numpy(),
            "pages": kept_HP.nonzero()[:, 1].to(torch.int32).cpu().numpy(),
            "mass": half_HP[kept_HP].cpu().numpy(),
            "rest": rest_H.half().cpu().numpy(),
        }


@dataclass(frozen=True, kw_only=True)
class Recording(Dense):
    """Dense, which passes the exact attention weights of every step to a tape."""

    tape: _Tape = field(repr=False, compare=False)
    layer: int = 0

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"weights", "prompt_mass", "vectors"})

    @override
    def for_layer(self, layer_idx: int) -> Self:
        return replace(self, layer=layer_idx)

    @override
    def admit(self, table: PageTable, mass_BKS: Tensor | None) -> None:
        assert mass_BKS is not None
        self.tape.prompt(self.layer, table, mass_BKS)

    @override
    def observe(self, table: PageTable, step: Step) -> None:
        self.tape.step(self.layer, table, step)


def _plain(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().cpu().numpy().reshape(-1)


def record(
    model: Any, tokenizer: Any, prompts: Iterable[Prompt], folder: Path | str, *, page_size: int = 1,
    top: int = TOP, vectors: bool = False, name: str | None = None, describe: Mapping[str, Any] | None = None,
    on_step: Callable[[Prompt, int], None] = lambda prompt, tokens: None,
) -> TraceStore:  # fmt: skip
    """Decode prompts greedily with Dense and store what every head read in every step.

    Problems that the folder has already are skipped, so the same call continues after an interruption. `TraceError`
    if the folder holds something else, or traces with other settings.

    Parameters
    ----------
    tokenizer
        For images, the tokenizer of the model's processor.
    page_size
        Tokens per page of the trace, 1 to 32. Policies can be replayed if their page size is a multiple.
    top
        Pages stored per head and step, by mass; 0 for all. Of the others only the sum is stored.
    vectors
        Also store queries, keys and values, for policies that read them (small models; page size 1).
    name, describe
        The model's name, and other facts about it to store.
    """
    check_int("page_size", page_size, 1, MAX_PAGE_SIZE)
    check_int("top", top, 0)
    if vectors and page_size != 1:
        raise ValueError(f"page_size={page_size} must be 1 to store vectors: they belong to tokens")
    check_model(model)
    if not all(map(has_pages, library_layers(model.config))):
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers without full attention, and a trace needs what all layers read"
        )
    settings = {"model": name or type(model).__name__, "page_size": page_size, "top": top, "vectors": vectors}
    store = TraceStore(folder, settings)
    for prompt in prompts:
        path = store.path(prompt.task, prompt.problem)
        if not path.exists():
            with replacing(path) as temporary, TraceWriter(temporary, vectors=vectors) as writer:
                tape = _Tape(writer, page_size, top, vectors, partial(on_step, prompt))
                header = _decode(model, tokenizer, prompt, tape)
                writer.close(replace(header, model={"name": settings["model"]} | dict(describe or {})))
    return store


@torch.no_grad()
def _decode(model: Any, tokenizer: Any, prompt: Prompt, tape: _Tape) -> Header:
    inputs: dict[str, Any] = {key: value.to(model.device) for key, value in prompt.inputs.items()}
    with PagedCache(model, Recording(tape=tape), None, batch_size=1) as cache:
        row = generate(
            model, inputs.pop("input_ids"), inputs.pop("attention_mask", None), past_key_values=cache,
            max_new_tokens=prompt.max_new_tokens, do_sample=False, num_beams=1, **inputs,
        )  # fmt: skip
    tokens = row[0].tolist()
    ends = model.generation_config.eos_token_id
    stopped = tokens[-1] in ([ends] if isinstance(ends, int) else ends or [])
    images = {getattr(model.config, field, None) for field in ("image_token_id", "video_token_id")} - {None}
    config = model.config.get_text_config(decoder=True)
    return Header(
        task=prompt.task, problem=prompt.problem, prompt_tokens=prompt.inputs["input_ids"].shape[1],
        token_ids=tuple(tokens), texts=tuple(tokenizer.decode([token]) for token in tokens),
        image=tuple(i for i, token in enumerate(tokens) if token in images), layers=config.num_hidden_layers,
        heads=config.num_attention_heads, kv_heads=tape.kv_heads, head_dim=tape.head_dim,
        scaling=tape.scaling, page_size=tape.page_size, top=tape.top, vectors=tape.vectors,
        finish="stop" if stopped else "length",
    )  # fmt: skip
