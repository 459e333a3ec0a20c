"""Life stories of pages, and the classes of pages and maps derived from them.

Shape suffixes: M maps (``layer * heads + head``), P pages. A map is the attention of one query head: steps x pages.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from longthink.lab.analyze.rules import Rules
from longthink.lab.analyze.store import Header, Trace

NEVER = -1


class PageClass(IntEnum):
    """Classes defined in `Rules`; the first that fits counts."""

    LAZY = 0
    SINK = 1
    LOCAL = 2
    PHOENIX = 3
    MILESTONE = 4


class MapClass(IntEnum):
    SINK_LIKE = 0
    MILESTONE = 1
    PHOENIX = 2
    MIXED = 3


@dataclass(frozen=True, kw_only=True)
class Lives:
    """The life of every page in every map. Steps are positions of the reading token; -1 means never."""

    header: Header
    rules: Rules
    birth_P: NDArray[np.int64]  # first step in which the page could be used
    uses_MP: NDArray[np.int64]
    first_MP: NDArray[np.int64]
    last_MP: NDArray[np.int64]
    far_last_MP: NDArray[np.int64]  # last use while not near
    gap_MP: NDArray[np.int64]  # longest rest between uses, or birth and first use
    mass_MP: NDArray[np.float64]  # total attention
    read_MP: NDArray[np.float64]  # attention in the steps that used it
    near_MP: NDArray[np.float64]  # the part of that while near
    half_MP: NDArray[np.int64]  # steps from birth to half of its attention
    end: int  # last step of the trace

    @property
    def classes_MP(self) -> NDArray[np.int64]:
        rules = self.rules
        age_P = self.end + 1 - self.birth_P
        often = (self.uses_MP >= rules.sink * age_P) & (age_P > rules.gap)
        conditions = [self.uses_MP == 0, often, self.far_last_MP == NEVER, self.gap_MP > rules.gap]
        order = [PageClass.LAZY, PageClass.SINK, PageClass.LOCAL, PageClass.PHOENIX]
        return np.select(conditions, order, PageClass.MILESTONE)

    @property
    def is_prompt_P(self) -> NDArray[np.bool_]:
        return np.arange(len(self.birth_P)) * self.header.page_size < self.header.prompt_tokens

    @property
    def is_image_P(self) -> NDArray[np.bool_]:
        found = np.zeros(len(self.birth_P), dtype=bool)
        found[np.array(self.header.image, dtype=int) // self.header.page_size] = True
        return found


def read_lives(trace: Trace, rules: Rules | None = None) -> Lives:
    """Return the life of every page. Reads the trace twice, step by step; memory holds pages, not steps."""
    rules, header = rules or Rules(), trace.header
    size, shape = header.page_size, (header.layers * header.heads, header.pages)
    birth_P = np.maximum(np.arange(header.pages) * size, header.prompt_tokens)
    uses, gap, half = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    first, last, far_last = (np.full(shape, NEVER) for _ in range(3))
    mass, read, near, so_far = (np.zeros(shape) for _ in range(4))
    for step in trace.steps():
        mass[step.head, step.page] += step.mass
        used = step.mass > rules.use
        cells = (step.head[used], step.page[used])
        is_near = step.now - ((cells[1] + 1) * size - 1) <= rules.local
        read[cells] += step.mass[used]
        near[cells] += step.mass[used] * is_near
        # The first rest begins just before birth.
        before = np.where(last[cells] == NEVER, birth_P[cells[1]] - 1, last[cells])
        gap[cells] = np.maximum(gap[cells], step.now - before - 1)
        first[cells] = np.where(first[cells] == NEVER, step.now, first[cells])
        last[cells] = step.now
        uses[cells] += 1
        far_last[cells] = np.where(is_near, far_last[cells], step.now)
    open_MP = np.ones(shape, dtype=bool)
    for step in trace.steps():
        so_far[step.head, step.page] += step.mass
        cells = (step.head, step.page)
        done = open_MP[cells] & (so_far[cells] >= 0.5 * mass[cells])
        cells = (step.head[done], step.page[done])
        half[cells] = step.now - birth_P[cells[1]]
        open_MP[cells] = False
    return Lives(
        header=header, rules=rules, birth_P=birth_P, uses_MP=uses, first_MP=first, last_MP=last,
        far_last_MP=far_last, gap_MP=gap, mass_MP=mass, read_MP=read, near_MP=near, half_MP=half,
        end=header.steps.stop - 1,
    )  # fmt: skip


def map_classes(lives: Lives) -> NDArray[np.int64]:
    """Return the `MapClass` of each map, M.

    Sink-like: at most `Rules.far` of its uses are of milestones and phoenixes. Otherwise milestone or phoenix, if one
    of them has more than `Rules.majority` of their sum; otherwise mixed, as is a map without any use.
    """
    near, milestones, phoenixes = read_shares(lives).T
    far = milestones + phoenixes
    most = lives.rules.majority * far
    conditions = [near + far == 0, far <= lives.rules.far, milestones > most, phoenixes > most]
    order = [MapClass.MIXED, MapClass.SINK_LIKE, MapClass.MILESTONE, MapClass.PHOENIX]
    return np.select(conditions, order, MapClass.MIXED)


def read_shares(lives: Lives) -> NDArray[np.float64]:
    """Return the shares of each map's uses, by attention: near or sinks, milestones, phoenixes. M x 3; 0: unused"""
    classes, far = lives.classes_MP, lives.read_MP - lives.near_MP
    total = np.maximum(lives.read_MP.sum(1), 1e-30)
    kinds = (PageClass.SINK, PageClass.MILESTONE, PageClass.PHOENIX)
    sinks, milestones, phoenixes = ((far * (classes == which)).sum(1) for which in kinds)
    return np.stack([lives.near_MP.sum(1) + sinks, milestones, phoenixes], 1) / total[:, None]
