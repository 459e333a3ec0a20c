"""Shares of classes over problems, with intervals, and the typical texts of a class."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longthink.lab.analyze.lives import Lives, MapClass, PageClass, map_classes
from longthink.lab.results.statistics import paired_bootstrap

_DRAWS = 1000  # there are many intervals


@dataclass(frozen=True)
class Share:
    """The share of a class and its 95 % bootstrap interval over problems, which is None with a single problem."""

    scope: str  # ``model``, a task, ``layer 0`` or ``layer 0 head 1``
    part: str  # ``all``, ``prompt``, ``decode``, ``image`` or ``text`` (of the prompt) pages, or ``maps``
    name: str  # the class
    share: float
    low: float | None
    high: float | None
    problems: int


def share_table(all_lives: Iterable[Lives]) -> list[Share]:
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for lives in all_lives:
        for key, share in _of_problem(lives).items():
            found[key].append(share)
    table = []
    for (scope, part, name), shares in found.items():
        share, low, high = mean_with_interval(shares)
        table.append(Share(scope, part, name, share, low, high, len(shares)))
    return table


def mean_with_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    spread = paired_bootstrap([0.0] * len(values), values, draws=_DRAWS)
    return (spread.mean, spread.low, spread.high) if len(values) > 1 else (spread.mean, None, None)


def _of_problem(lives: Lives) -> dict[tuple[str, str, str], float]:
    header, classes_MP = lives.header, lives.classes_MP
    maps_M = map_classes(lives)
    layer_M, head_M = np.divmod(np.arange(len(maps_M)), header.heads)
    scopes = {"model": layer_M >= 0, header.task: layer_M >= 0}
    scopes |= {f"layer {i}": layer_M == i for i in range(header.layers)}
    for i, j in np.ndindex(header.layers, header.heads):
        scopes[f"layer {i} head {j}"] = (layer_M == i) & (head_M == j)
    prompt_P, image_P = lives.is_prompt_P, lives.is_image_P
    parts = {"all": prompt_P | True, "prompt": prompt_P, "decode": ~prompt_P}
    if image_P.any():
        parts |= {"image": image_P, "text": prompt_P & ~image_P}
    found = {}
    for scope, mine_M in scopes.items():
        for part, pages_P in parts.items():
            if pages_P.any():
                counts = np.bincount(classes_MP[mine_M][:, pages_P].ravel(), minlength=len(PageClass))
                for one in PageClass:
                    found[scope, part, one.name.lower()] = counts[one] / counts.sum()
        counts = np.bincount(maps_M[mine_M], minlength=len(MapClass))
        for which in MapClass:
            found[scope, "maps", which.name.lower().replace("_", "-")] = counts[which] / counts.sum()
    return found


@dataclass(frozen=True, kw_only=True)
class TypicalText:
    text: str
    count: int  # pages with it that are of the class in at least one map
    lift: float  # its frequency among them, relative to all pages


def telling_texts(
    all_lives: Sequence[Lives], which: PageClass = PageClass.MILESTONE, *, part: str = "decode",
    count: int = 12,
) -> list[TypicalText]:  # fmt: skip
    mine, everything = Counter[str](), Counter[str]()
    for lives in all_lives:
        texts = page_texts(lives)
        of_class_P = (lives.classes_MP == which).any(0)
        for page in np.nonzero(lives.is_prompt_P == (part == "prompt"))[0]:
            everything[texts[page]] += 1
            mine[texts[page]] += bool(of_class_P[page])
    total, base = max(1, mine.total()), max(1, everything.total())
    return [
        TypicalText(text=text, count=number, lift=number / total / (everything[text] / base))
        for text, number in mine.most_common(count)
        if number
    ]


def page_texts(lives: Lives) -> list[str]:
    header = lives.header
    size, texts = header.page_size, header.texts
    glue = "" if any(text[:1].isspace() for text in texts) or size == 1 else " "
    return [glue.join(texts[page * size : (page + 1) * size]) for page in range(len(lives.birth_P))]
