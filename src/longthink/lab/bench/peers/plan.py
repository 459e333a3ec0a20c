"""Which systems are measured side by side, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from longthink.config import check_choice, check_int
from longthink.lab.bench.plan import BLOCK

MODELS = {
    name: f"random:layers=8,hidden=512,heads=8,kv_heads={kv_heads},head_dim=64"
    for name, kv_heads in (("S8", 8), ("S2", 2))
}
"""The random models that are measured, by their short names: as many KV heads as query heads, and a quarter."""

COMPILED = "hf static compiled"
TRANSFORMERS = {"hf dynamic": "dynamic", "hf static": "static", COMPILED: "compiled"}
OPENVINO = {
    "openvino f32": ("f32", False),
    "openvino f32 eviction": ("f32", True),
    "openvino u8": ("u8", False),
    "openvino u8 eviction": ("u8", True),
}
"""Format of keys and values, and whether a `CacheEvictionConfig` bounds them."""
KEEP_ALL = (*TRANSFORMERS, *(name for name, (_, evicts) in OPENVINO.items() if not evicts))
"""Peers that keep every token."""
KVPRESS = "kvpress decoding"
FLOOR = "byte floor"
"""Reading weights, keys and values of the budget, and nothing else."""
NARROW = "bfloat16"
"""A way to run a policy: keys and values in two bytes beside a float32 model."""
CONTROL = "recency:page_size=16"
"""Below its budget it reads as many slots as any bounded cache, and scores, stamps and evicts nothing."""

WORKERS = {
    **{name: ("longthink.lab.bench.peers.own", "") for name in ("hf dynamic", "hf static")},
    # Each compiled program starts with an empty compiler, so it has a process to itself.
    COMPILED: ("longthink.lab.bench.peers.own", "compiled"),
    KVPRESS: ("longthink.lab.bench.peers.with_kvpress", "kvpress"),
    **dict.fromkeys(OPENVINO, ("longthink.lab.bench.peers.with_openvino", "openvino")),
}
"""Module that measures a peer, and what sets its process apart."""
PEERS = {name.replace(" ", "-"): name for name in WORKERS}
"""Names of the peers as the command line has them."""
POLICIES = ("dense", "streaming_llm", "h2o", "quest", "raas", "milestone")

BLOCK_STEPS = 3 * BLOCK
"""Steps of a block at most: whole pages, and enough of them to make little of a call's beginning."""
SHORT, MIDDLE, LONG = 2048, 16384, 32768
"""Contexts that the targets speak of."""


@dataclass(frozen=True, kw_only=True)
class PeersPlan:
    """What to measure.

    Attributes
    ----------
    peers
        Some of the values of `PEERS`.
    policies
        Policies of longthink, as texts.
    models
        Names of random models (see `longthink.lab.bench.models`) by short names.
    contexts
        Tokens in front of the timed steps.
    batches
        Numbers of rows that are decoded side by side after `MIDDLE` tokens, on the last model.
    batched
        Systems that are measured in batches.
    budget
        Tokens that bounded caches keep.
    prompt
        Tokens of the prompt, where the rest of the context is made up.
    rounds
        Timed blocks of each system.
    brief
        Models of which only dense and RaaS are measured of ours, nothing of bookkeeping, and no compiled peer.
    narrow
        Whether RaaS is measured with keys and values in two bytes as well.
    at_once
        Whether all systems of all scenes get ready before the first is timed: sooner done, and the caches of all take
        memory side by side.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    peers: Sequence[str]
    policies: Sequence[str] = POLICIES
    models: dict[str, str] = field(default_factory=MODELS.copy)
    contexts: Sequence[int] = (SHORT, 4096, 8192, MIDDLE, LONG)
    batches: Sequence[int] = (1, 4, 16)
    batched: Sequence[str] = ("hf static", "dense", "raas", "milestone")
    budget: int = 1024
    prompt: int = 128
    rounds: int = 5
    brief: Sequence[str] = ()
    narrow: bool = True
    at_once: bool = False

    def __post_init__(self) -> None:
        check_int("rounds", self.rounds, 1)
        check_int("budget", self.budget, self.prompt + BLOCK + BLOCK_STEPS * (self.rounds + 1))
        for name in self.peers:
            check_choice("peers", name, tuple(WORKERS))
        for context in self.contexts:
            check_int("contexts", context, self.budget)


QUICK = {
    "peers": ("hf static", COMPILED, KVPRESS, "openvino f32 eviction"),
    "policies": ("dense", "raas", "milestone"),
    "contexts": (MIDDLE,),
    "batches": (16,),
    "batched": ("hf static", "raas"),
    "rounds": 3,
    "brief": ("S2",),
    "narrow": False,
    "at_once": True,
}
"""What changes where only the targets are wanted, each on one model: compiling takes nearly all the time."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One system at one place of a scene: what a `Point` says, and not how."""

    system: str
    context: int
    rows: int = 1
    way: str = ""

    @property
    def label(self) -> str:
        """Name of the system in tables and figures."""
        return f"{self.system} ({self.way})" if self.way else self.system


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is measured in the same rounds, and so may be compared."""

    model: str
    places: tuple[Place, ...]
    batch: bool = False
    """Whether it is about rows side by side."""


def scenes(plan: PeersPlan) -> list[Scene]:
    """Return the scenes of a plan: one for each model and context, and one for each batch."""
    found = []
    for model in plan.models:
        for context in plan.contexts:
            # The text in front of OpenVINO's steps cannot be made up: reading 32k tokens takes each of them minutes.
            peers = [name for name in plan.peers if context <= MIDDLE or name not in OPENVINO]
            if model in plan.brief:
                peers = [name for name in peers if name != COMPILED]
            policies = [
                name for name in plan.policies if model not in plan.brief or name in ("dense", "raas")
            ]
            names = (*peers, *policies, FLOOR)
            places = [Place(system=name, context=context) for name in names]
            if context == MIDDLE:
                places += _for_targets(plan, model)
            found.append(Scene(model=model, places=tuple(places)))
    for rows in plan.batches:
        allowed = (*plan.peers, *plan.policies)
        places = [Place(system=name, context=MIDDLE, rows=rows) for name in plan.batched if name in allowed]
        found.append(Scene(model=list(plan.models)[-1], places=tuple(places), batch=True))
    return found


def _for_targets(plan: PeersPlan, model: str) -> list[Place]:
    """What the targets compare beside the curves: other lengths, other ways, and a step without bookkeeping."""
    if "raas" not in plan.policies:
        return []
    places = [
        Place(system="raas", context=SHORT),
        Place(system="raas", context=LONG),
        Place(system="raas", context=MIDDLE, way="generate"),
    ]
    if plan.narrow:
        places.append(Place(system="raas", context=MIDDLE, way=NARROW))
    if model not in plan.brief:
        places.append(Place(system=CONTROL, context=plan.prompt + BLOCK))
    return places
