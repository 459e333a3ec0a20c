"""The targets of this project against the peers, with the measurements beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from bench.peers.measure import Results, Timing
from bench.peers.plan import CONTROL, FLOOR, KVPRESS, LONG, MIDDLE, NARROW, SHORT, TRANSFORMERS, Case

_RAAS = Case(system="raas", context=MIDDLE)
_BEST_DENSE = "the best dense cache of transformers"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure to reach, and the measured one: median, lowest and highest round, None where something is missing."""

    text: str
    model: str
    sign: str  # "<=" or ">="
    wanted: float
    percent: bool = False
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    remark: str = ""  # what is missing, or what to know about the figure

    @property
    def met(self) -> bool | None:
        """Whether the target is met, None if it was not measured."""
        if self.measured is None:
            return None
        return self.measured <= self.wanted if self.sign == "<=" else self.measured >= self.wanted


@dataclass(frozen=True, kw_only=True)
class _Ratio:
    """Step time of one case over that of another, with the wanted figure for each model."""

    text: str
    over: Case
    under: Case
    sign: str
    wanted: dict[str, float]
    share: bool = False
    """Take the share of `over` that is left after subtracting `under`."""


def _both(figure: float) -> dict[str, float]:
    return {"S8": figure, "S2": figure}


_RATIOS = (
    _Ratio(
        text="RaaS after 32k tokens / after 2k",
        over=Case(system="raas", context=LONG), under=Case(system="raas", context=SHORT),
        sign="<=", wanted=_both(1.03),
    ),
    _Ratio(
        text="best dense of transformers / RaaS, 16k",
        over=Case(system=_BEST_DENSE, context=MIDDLE), under=_RAAS,
        sign=">=", wanted={"S8": 4.5, "S2": 3.3},
    ),
    _Ratio(
        text="our dense / RaaS, 16k",
        over=Case(system="dense", context=MIDDLE), under=_RAAS, sign=">=", wanted={"S8": 4.5, "S2": 2.5},
    ),
    _Ratio(
        text="RaaS / OpenVINO GenAI f32 with eviction, 16k",
        over=_RAAS, under=Case(system="openvino f32 eviction", context=MIDDLE), sign="<=", wanted=_both(0.95),
    ),
    _Ratio(
        text="RaaS with bfloat16 keys and values / the same",
        over=Case(system="raas", context=MIDDLE, mode=NARROW),
        under=Case(system="openvino f32 eviction", context=MIDDLE), sign="<=", wanted=_both(0.95),
    ),
    _Ratio(
        text="kvpress DecodingPress / RaaS, 16k",
        over=Case(system=KVPRESS, context=MIDDLE), under=_RAAS, sign=">=", wanted=_both(1.7),
    ),
    _Ratio(
        text="bookkeeping of RaaS, share of the step",
        over=_RAAS, under=Case(system=CONTROL, context=0), sign="<=", wanted=_both(0.04), share=True,
    ),
    _Ratio(
        text="bookkeeping of milestone, share of the step",
        over=Case(system="milestone", context=MIDDLE), under=Case(system=CONTROL, context=0),
        sign="<=", wanted=_both(0.08), share=True,
    ),
    _Ratio(
        text="RaaS / byte floor",
        over=_RAAS, under=Case(system=FLOOR, context=MIDDLE), sign="<=", wanted={"S8": 1.1, "S2": 1.25},
    ),
    _Ratio(
        text="longthink.generate / bare loop, RaaS",
        over=Case(system="raas", context=MIDDLE, mode="generate"), under=_RAAS,
        sign="<=", wanted=_both(1.05),
    ),
    _Ratio(
        text="RaaS tokens/s / HF static tokens/s, batch 16, 16k",
        over=Case(system="hf static", context=MIDDLE, rows=16),
        under=Case(system="raas", context=MIDDLE, rows=16), sign=">=", wanted={"S2": 8.0},
    ),
)  # fmt: skip
_MEMORY = 1.07


def targets(results: Results, models: Sequence[str]) -> list[Target]:
    """Return every target for the models that were measured.

    A ratio is the median over the rounds of the ratio within a round, so that a disturbance hits both sides of it.
    """
    found = []
    for ratio in _RATIOS:
        found += [_target(ratio, model, results) for model in models if model in ratio.wanted]
    return found + [_memory(model, results) for model in models]


def _target(ratio: _Ratio, model: str, results: Results) -> Target:
    pairs = []
    for scene in sorted({one.scene for one in results.timings}):
        here = [one for one in results.timings if one.scene == scene and one.model == model]
        over, under = _find(ratio.over, here), _find(ratio.under, here)
        if over and under:
            pairs.append((over, under))
    target = Target(
        text=ratio.text, model=model, sign=ratio.sign, wanted=ratio.wanted[model], percent=ratio.share
    )
    if not pairs:
        names = (ratio.over.system, ratio.under.system)
        why = [f"{name}: {results.missing[name]}" for name in names if name in results.missing]
        return replace(target, remark="; ".join(why) or "not asked for")
    over, under = pairs[0]
    values = [a / b for a, b in zip(over.ms, under.ms, strict=True)]
    remark = over.case.label if ratio.over.system == _BEST_DENSE else ""
    if ratio.share:
        values = [1 - 1 / value for value in values]
        remark = f"{median(over.ms):.2f} ms, {median(under.ms):.2f} ms without"
    return replace(target, measured=median(values), low=min(values), high=max(values), remark=remark)


def _find(case: Case, here: Sequence[Timing]) -> Timing | None:
    """Find the timing of a case; the control matches at any context, the best dense cache is the fastest one."""
    if case.system == _BEST_DENSE:
        dense = [
            one
            for one in here
            if one.case.system in TRANSFORMERS and (one.case.context, one.case.rows) == (case.context, 1)
        ]
        return min(dense, key=lambda one: median(one.ms), default=None)
    for one in here:
        if one.case == case or one.case.system == case.system == CONTROL:
            return one
    return None


def _memory(model: str, results: Results) -> Target:
    """Compare all bytes that RaaS keeps, in any scene, with the keys and values of its budget."""
    target = Target(text="RaaS bytes / bytes of L tokens", model=model, sign="<=", wanted=_MEMORY)
    mine = [
        one for one in results.timings if (one.model, one.case.rows) == (model, 1) and one.case.mode != NARROW
    ]
    kept = [one.row.kv_bytes + one.row.metadata_bytes for one in mine if one.case.system == "raas"]
    budget = next((one.row.kv_bytes for one in mine if one.case.system == FLOOR), None)
    if not kept or not budget:
        return replace(target, remark="not asked for")
    low, high = min(kept) / budget, max(kept) / budget
    remark = "constant" if low == high else "NOT constant"
    return replace(target, measured=high, low=low, high=high, remark=remark)
