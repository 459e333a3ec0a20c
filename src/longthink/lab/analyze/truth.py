"""Agreement of life stories with the built-in task, for which it is known which tokens are needed until when."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longthink.lab.analyze.lives import NEVER, Lives, PageClass
from longthink.reasoner import make_problem
from longthink.reasoner.reads import NeededToken, needed_tokens


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Tokens found by the analysis against tokens needed by the worked solution."""

    part: str  # ``prompt`` (facts and rules) or ``decode`` (results)
    found: int  # that some map uses beyond their neighbourhood
    needed: int  # that the solution reads beyond theirs
    both: int
    ends: int  # in both, with the last use in the last step that needs them
    kinds: dict[str, int]  # found ones by class in the map that used them last

    @property
    def precision(self) -> float:
        return self.both / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        return self.both / self.needed if self.needed else 1.0


def total(parts: Sequence[Agreement]) -> Agreement:
    first, *_ = parts
    counts = {name: sum(getattr(one, name) for one in parts) for name in ("found", "needed", "both", "ends")}
    kinds = {name: sum(one.kinds[name] for one in parts) for name in first.kinds}
    return Agreement(part=first.part, kinds=kinds, **counts)


def agreement(lives: Lives, map_index: int | None = None) -> list[Agreement] | None:
    """Compare a trace of a built-in problem with its worked solution: all maps, or one.

    None if it is another task, the pages are not single tokens, or the model wrote something else.
    """
    header = lives.header
    if not header.task.startswith("reasoner/") or header.page_size != 1:
        return None
    _, size, profile = header.task.split("/")
    problem = make_problem(profile=profile, size=size, seed=int(header.problem))
    words = [*problem.prompt.split(), *problem.solution.split()]
    if list(header.texts[1 : 1 + len(words)]) != words:
        return None
    needed = needed_tokens(problem)
    return [_agreement(lives, part, needed, map_index) for part in ("prompt", "decode")]


def _agreement(lives: Lives, part: str, needed: list[NeededToken], map_index: int | None) -> Agreement:
    last_MP, classes_MP = lives.far_last_MP, lives.classes_MP
    if map_index is not None:
        last_MP, classes_MP = last_MP[map_index : map_index + 1], classes_MP[map_index : map_index + 1]
    mine_P = lives.is_prompt_P == (part == "prompt")
    last_P, kind_P = last_MP.max(0), classes_MP[last_MP.argmax(0), np.arange(last_MP.shape[1])]
    found = set(np.nonzero(mine_P & (last_P != NEVER))[0].tolist())
    ends = {one.position: one.reads[-1] for one in needed if mine_P[one.position]}
    ends = {position: end for position, end in ends.items() if end - position > lives.rules.local}
    both, classes = found & ends.keys(), (PageClass.MILESTONE, PageClass.PHOENIX)
    kinds = {one.name.lower(): sum(int(kind_P[position] == one) for position in found) for one in classes}
    met = sum(int(last_P[position]) == ends[position] for position in both)
    return Agreement(part=part, found=len(found), needed=len(ends), both=len(both), ends=met, kinds=kinds)
