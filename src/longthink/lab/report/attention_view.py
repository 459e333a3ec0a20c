"""A trace as data for the attention page: texts, uses and evictions, as JSON with packed numbers."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longthink.cli.text import visible
from longthink.lab.analyze.lives import Lives, MapClass, PageClass, map_classes, read_shares
from longthink.lab.analyze.replays import Replay
from longthink.lab.analyze.shares import page_texts
from longthink.lab.analyze.store import Trace

MAX_USES = 300_000  # uses shown of one trace; beyond that only the strongest
MAX_GONE = 400_000
"""Evictions of one replay shown per table; beyond that only when the last table evicts a page."""
CURVE_POINTS = 400
CLASS_NAMES = [one.name.lower() for one in PageClass]
MAP_NAMES = [one.name.lower().replace("_", "-") for one in MapClass]


def read_uses(trace: Trace, lives: Lives) -> dict[str, NDArray[Any]]:
    """Return every use in a trace, by steps: ``step``, ``page``, ``map``, ``mass``, and the page's ``kind``."""
    parts: dict[str, list[NDArray[Any]]] = {"step": [], "page": [], "map": [], "mass": []}
    for step in trace.steps():
        used = step.mass > lives.rules.use
        parts["step"].append(np.full(int(used.sum()), step.now))
        for name, of in (("page", step.page), ("map", step.head), ("mass", step.mass)):
            parts[name].append(of[used])
    uses = {name: np.concatenate([np.zeros(0), *of]) for name, of in parts.items()}
    if len(uses["step"]) > MAX_USES:
        strongest = np.sort(np.argsort(-uses["mass"], kind="stable")[:MAX_USES])
        uses = {name: of[strongest] for name, of in uses.items()}
    uses |= {name: uses[name].astype(np.int64) for name in ("step", "page", "map")}
    return uses | {"kind": lives.classes_MP[uses["map"], uses["page"]]}


def view_of(trace: Trace, lives: Lives, replays: Sequence[Replay]) -> dict[str, Any]:
    header = trace.header
    uses = read_uses(trace, lives)
    shares, classes = read_shares(lives), map_classes(lives)
    return {
        "name": visible(f"{header.task} {header.problem}"),
        "texts": [visible(text) for text in page_texts(lives)],
        "spaced": not any(text[:1].isspace() for text in header.texts),
        "size": header.page_size,
        "prompt": header.prompt_tokens,
        "end": header.steps.stop,
        "layers": header.layers,
        "heads": header.heads,
        "image": [int(page) for page in np.nonzero(lives.is_image_P)[0]],
        "uses": {
            **{name: _packed(uses[name], np.uint32) for name in ("step", "page")},
            "map": _packed(uses["map"], np.uint16),
            "kind": _packed(uses["kind"], np.uint8),
            "mass": _packed(np.rint(255 * uses["mass"].clip(0, 1)), np.uint8),
        },
        "maps": [
            {"kind": MAP_NAMES[kind], "shares": [round(float(share), 4) for share in row]}
            for kind, row in zip(classes, shares, strict=True)
        ],
        "replays": [_replay(one) for one in replays if not one.note],
    }


def _replay(one: Replay) -> dict[str, Any]:
    sizes = {"budget": one.budget, "decode budget": one.decode_budget}
    curve = one.curve_T.astype(np.float64)
    gone = one.gone_LKN.astype(np.int64).reshape(max(1, len(one.gone_LKN) * one.gone_LKN.shape[1]), -1)
    if gone.size > MAX_GONE:  # one table for all: a page is gone when the last table has evicted it
        gone = np.where((gone < 0).any(0), -1, gone.max(0))[None]
    budgets = [f"{kind} {tokens}" for kind, tokens in sizes.items() if tokens is not None]
    parts = np.array_split(curve, min(CURVE_POINTS, max(1, len(curve))))
    return {
        "label": visible(", ".join([one.policy, *budgets])),
        "recall": round(one.recall, 4),
        "lookups": None if np.isnan(one.lookups) else round(one.lookups, 4),
        "evictions": one.evictions,
        "regrets": one.regrets,
        "curve": [round(float(part.mean()), 4) for part in parts if len(part)],
        "tables": len(gone),
        "gone": _packed(np.where(gone < 0, 0, gone), np.uint32),
    }


def _packed(values: NDArray[Any], kind: Any) -> str:
    return base64.b64encode(values.astype(np.dtype(kind).newbyteorder("<")).tobytes()).decode()
