"""What we set out to reach against the peers, with what was measured beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from longthink.lab.bench.peers.measure import Found, Timed
from longthink.lab.bench.peers.plan import (
    CONTROL,
    FLOOR,
    KVPRESS,
    LONG,
    MIDDLE,
    NARROW,
    SHORT,
    TRANSFORMERS,
    Place,
)

_RAAS = Place(system="raas", context=MIDDLE)
_BEST_DENSE = "the best dense cache of transformers"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure to reach.

    Attributes
    ----------
    text
        What is compared.
    model
        Short name of the model.
    sign, wanted
        ``<=`` or ``>=``, and the figure.
    percent
        Whether figures are shares.
    measured
        Median over the rounds, None where something is missing.
    low, high
        Lowest and highest round.
    remark
        What is missing, or what must be known beside the figure.
    """

    text: str
    model: str
    sign: str
    wanted: float
    percent: bool = False
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    remark: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the measured figure is as wanted, None where there is none."""
        if self.measured is None:
            return None
        return self.measured <= self.wanted if self.sign == "<=" else self.measured >= self.wanted


@dataclass(frozen=True, kw_only=True)
class _Ratio:
    """The time of a step of one system over that of another; a share is what the other leaves of it."""

    text: str
    over: Place
    under: Place
    sign: str
    wanted: dict[str, float]
    share: bool = False


_RATIOS = (
    _Ratio(
        text="RaaS after 32k tokens / after 2k",
        over=Place(system="raas", context=LONG), under=Place(system="raas", context=SHORT),
        sign="<=", wanted={"S8": 1.03, "S2": 1.03},
    ),
    _Ratio(
        text="best dense of transformers / RaaS, 16k",
        over=Place(system=_BEST_DENSE, context=MIDDLE), under=_RAAS,
        sign=">=", wanted={"S8": 4.5, "S2": 3.3},
    ),
    _Ratio(
        text="our dense / RaaS, 16k",
        over=Place(system="dense", context=MIDDLE), under=_RAAS, sign=">=", wanted={"S8": 4.5, "S2": 2.5},
    ),
    _Ratio(
        text="RaaS / OpenVINO GenAI f32 with eviction, 16k",
        over=_RAAS, under=Place(system="openvino f32 eviction", context=MIDDLE),
        sign="<=", wanted={"S8": 0.95, "S2": 0.95},
    ),
    _Ratio(
        text="RaaS with bfloat16 keys and values / the same",
        over=Place(system="raas", context=MIDDLE, way=NARROW),
        under=Place(system="openvino f32 eviction", context=MIDDLE),
        sign="<=", wanted={"S8": 0.95, "S2": 0.95},
    ),
    _Ratio(
        text="kvpress DecodingPress / RaaS, 16k",
        over=Place(system=KVPRESS, context=MIDDLE), under=_RAAS, sign=">=", wanted={"S8": 1.7, "S2": 1.7},
    ),
    _Ratio(
        text="bookkeeping of RaaS, share of the step",
        over=_RAAS, under=Place(system=CONTROL, context=0), sign="<=", wanted={"S8": 0.04, "S2": 0.04},
        share=True,
    ),
    _Ratio(
        text="bookkeeping of milestone, share of the step",
        over=Place(system="milestone", context=MIDDLE), under=Place(system=CONTROL, context=0),
        sign="<=", wanted={"S8": 0.08, "S2": 0.08}, share=True,
    ),
    _Ratio(
        text="RaaS / byte floor",
        over=_RAAS, under=Place(system=FLOOR, context=MIDDLE), sign="<=", wanted={"S8": 1.1, "S2": 1.25},
    ),
    _Ratio(
        text="longthink.generate / bare loop, RaaS",
        over=Place(system="raas", context=MIDDLE, way="generate"), under=_RAAS,
        sign="<=", wanted={"S8": 1.05, "S2": 1.05},
    ),
    _Ratio(
        text="RaaS tokens/s / HF static tokens/s, batch 16, 16k",
        over=Place(system="hf static", context=MIDDLE, rows=16),
        under=Place(system="raas", context=MIDDLE, rows=16), sign=">=", wanted={"S2": 8.0},
    ),
)  # fmt: skip
_MEMORY = 1.07


def targets(found: Found, models: Sequence[str]) -> list[Target]:
    """Return every target for the models that were measured.

    A ratio is taken within each round and its median over the rounds, so that what disturbs a round disturbs both
    sides of it.
    """
    made = []
    for ratio in _RATIOS:
        made += [_target(ratio, model, found) for model in models if model in ratio.wanted]
    return made + [_memory(model, found) for model in models]


def _target(ratio: _Ratio, model: str, found: Found) -> Target:
    pairs = []
    for scene in sorted({one.scene for one in found.timed}):
        here = [one for one in found.timed if one.scene == scene and one.model == model]
        over, under = _at(ratio.over, here), _at(ratio.under, here)
        if over and under:
            pairs.append((over, under))
    target = Target(
        text=ratio.text, model=model, sign=ratio.sign, wanted=ratio.wanted[model], percent=ratio.share
    )
    if not pairs:
        return replace(target, remark=_why(ratio, found))
    over, under = pairs[0]
    values = [a / b for a, b in zip(over.ms, under.ms, strict=True)]
    if ratio.share:
        values = [1 - 1 / value for value in values]
    remark = over.place.label if ratio.over.system == _BEST_DENSE else ""
    if ratio.share:
        remark = f"{median(over.ms):.2f} ms, {median(under.ms):.2f} ms without"
    return replace(target, measured=median(values), low=min(values), high=max(values), remark=remark)


def _at(place: Place, here: Sequence[Timed]) -> Timed | None:
    """Find what was measured at a place; the control is where it is, and the best dense cache the fastest."""
    if place.system == _BEST_DENSE:
        dense = [
            one
            for one in here
            if one.place.system in TRANSFORMERS and (one.place.context, one.place.rows) == (place.context, 1)
        ]
        return min(dense, key=lambda one: median(one.ms), default=None)
    for one in here:
        if one.place == place or one.place.system == place.system == CONTROL:
            return one
    return None


def _why(ratio: _Ratio, found: Found) -> str:
    names = [ratio.over.system, ratio.under.system]
    missing = [f"{name}: {found.missing[name]}" for name in names if name in found.missing]
    return "; ".join(missing) or "not asked for"


def _memory(model: str, found: Found) -> Target:
    """Bytes of all that RaaS keeps, over those of the keys and values of its budget, wherever it was measured."""
    target = Target(text="RaaS bytes / bytes of L tokens", model=model, sign="<=", wanted=_MEMORY)
    mine = [
        one for one in found.timed if (one.model, one.place.rows) == (model, 1) and one.place.way != NARROW
    ]
    held = [one.row.kv_bytes + one.row.metadata_bytes for one in mine if one.place.system == "raas"]
    budget = next((one.row.kv_bytes for one in mine if one.place.system == FLOOR), None)
    if not held or not budget:
        return replace(target, remark="not asked for")
    constant = "constant" if min(held) == max(held) else "NOT constant"
    return replace(
        target, measured=max(held) / budget, low=min(held) / budget, high=max(held) / budget, remark=constant
    )
