"""Which systems are compared, and in which state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from longthink.config import check_choice, check_int
from longthink.lab.bench.plan import BLOCK

MODELS = {
    name: f"random:layers=8,hidden=512,heads=8,kv_heads={kv_heads},head_dim=64"
    for name, kv_heads in (("S8", 8), ("S2", 2))
}
"""The random models by short name: as many KV heads as query heads, and a quarter of them."""

COMPILED = "hf static compiled"
TRANSFORMERS = {"hf dynamic": "dynamic", "hf static": "static", COMPILED: "compiled"}
OPENVINO = ("openvino f32", "openvino f32 eviction", "openvino u8", "openvino u8 eviction")
"""Number format of keys and values, and whether a `CacheEvictionConfig` bounds them."""
DENSE = (*TRANSFORMERS, "openvino f32", "openvino u8")
"""Peers that keep every token."""
KVPRESS = "kvpress decoding"
FLOOR = "byte floor"
"""Reads the weights and the keys and values of the budget, and does nothing else."""
NARROW = "bfloat16"
"""Mode of a policy: keys and values in two bytes beside a float32 model."""
CONTROL = "recency:page_size=16"
"""Below its budget it reads as many slots as any bounded cache, and scores, stamps and evicts nothing."""

OWN = "bench.peers.own"
WORKERS = {
    **{name: (OWN, "") for name in ("hf dynamic", "hf static")},
    # Each compiled program starts by resetting the compiler, so it needs a process to itself.
    COMPILED: (OWN, "compiled"),
    KVPRESS: ("bench.peers.with_kvpress", "kvpress"),
    **dict.fromkeys(OPENVINO, ("bench.peers.with_openvino", "openvino")),
}
"""Module that measures a peer, and the environment or name of its process."""
PEERS = {name.replace(" ", "-"): name for name in WORKERS}
"""Peers by their names on the command line."""
POLICIES = ("dense", "streaming_llm", "h2o", "quest", "raas", "milestone")

BLOCK_STEPS = 3 * BLOCK
"""Longest block: whole pages, and long enough to hide the cost of a call."""
SHORT, MIDDLE, LONG = 2048, 16384, 32768
"""Contexts that the targets refer to."""


@dataclass(frozen=True, kw_only=True)
class PeersPlan:
    """What to measure; a `ValueError` names what is out of range."""

    peers: Sequence[str]  # values of `PEERS`
    policies: Sequence[str] = POLICIES
    models: dict[str, str] = field(default_factory=MODELS.copy)
    contexts: Sequence[int] = (SHORT, 4096, 8192, MIDDLE, LONG)
    batches: Sequence[int] = (1, 4, 16)  # on the last model, after `MIDDLE` tokens
    batched: Sequence[str] = ("hf static", "dense", "raas", "milestone")
    budget: int = 1024
    prompt: int = 128  # the rest of the context is filled with random data
    rounds: int = 5
    brief: Sequence[str] = ()
    """Models on which only dense and RaaS are measured of our policies, no bookkeeping, and no compiled peer."""
    narrow: bool = True
    """Whether RaaS is measured with keys and values in two bytes as well."""
    at_once: bool = False
    """Prepare all scenes before timing the first: faster, but all caches are in memory at the same time."""

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
"""Settings of a quick run, which takes only what the targets need: nearly all of its time goes into compiling."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A system in a state."""

    system: str
    context: int
    rows: int = 1
    mode: str = ""

    @property
    def label(self) -> str:
        """Name of the system in tables and figures."""
        return f"{self.system} ({self.mode})" if self.mode else self.system


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The cases that are timed in the same rounds; only these are comparable."""

    model: str
    cases: tuple[Case, ...]
    batch: bool = False
    """Whether the scene compares batches."""


def scenes(plan: PeersPlan) -> list[Scene]:
    """Return the scenes of a plan: one per model and context, and one per batch size."""
    found = []
    for model in plan.models:
        brief = model in plan.brief
        for context in plan.contexts:
            # OpenVINO has to read its context: 32k tokens take minutes.
            peers = [name for name in plan.peers if context <= MIDDLE or name not in OPENVINO]
            peers = [name for name in peers if not brief or name != COMPILED]
            policies = [name for name in plan.policies if not brief or name in ("dense", "raas")]
            cases = [Case(system=name, context=context) for name in (*peers, *policies, FLOOR)]
            if context == MIDDLE:
                cases += _for_targets(plan, model)
            found.append(Scene(model=model, cases=tuple(cases)))
    for rows in plan.batches:
        allowed = (*plan.peers, *plan.policies)
        cases = [Case(system=name, context=MIDDLE, rows=rows) for name in plan.batched if name in allowed]
        found.append(Scene(model=list(plan.models)[-1], cases=tuple(cases), batch=True))
    return found


def _for_targets(plan: PeersPlan, model: str) -> list[Case]:
    """Return what the targets need beside the curves: other contexts and modes, and a step without bookkeeping."""
    if "raas" not in plan.policies:
        return []
    cases = [
        Case(system="raas", context=SHORT),
        Case(system="raas", context=LONG),
        Case(system="raas", context=MIDDLE, mode="generate"),
    ]
    if plan.narrow:
        cases.append(Case(system="raas", context=MIDDLE, mode=NARROW))
    if model not in plan.brief:
        cases.append(Case(system=CONTROL, context=plan.prompt + BLOCK))
    return cases
