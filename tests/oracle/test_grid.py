"""Every policy x switch x page size x kind of budget x group size, on long enough runs, one case each."""

import itertools
import math

import pytest

from tests.grids import by_day, covering, slow_but
from tests.oracle.harness import Case, compare

PAGE_SIZES = (1, 4, 8, 16, 32)
RAAS_SWITCHES = [
    {"used": used, "score": score, "sharing": sharing, "pin_prompt": pin_prompt}
    for used, score, sharing, pin_prompt in itertools.product(
        ("top_r", "alpha"), ("bound", "exact"), ("kv_head", "layer"), (True, False)
    )
]
PAGED = [("fifo", {}), ("recency", {}), ("random", {"seed": 7}), ("quest", {})]
MILESTONE = [
    ("milestone", {"alpha": alpha, "keep": keep, "young": young})
    for alpha, keep, young in ((0.5, 0.8, 12), (0.2, 0.3, 2))
]
RECALL = [
    ("recall", {"alpha": alpha, "keep": keep, "young": young, "memory": memory, "head_start": 0.05})
    for alpha, keep, young, memory in ((0.3, 0.8, 2, 8), (0.6, 0.5, 12, 100))
]
PAGED += [("raas", switches) for switches in RAAS_SWITCHES]
TOKEN_LEVEL = [("h2o", {"pin_prompt": False}), ("h2o", {"pin_prompt": True}), ("h2o", {"heavy": 0.25})]
TOKEN_LEVEL += [("streaming_llm", {"sinks": 4, "positions": "logical"})]
VOTING = {"window": 4, "kernel": 3}
PEERS = [
    ("keydiff", {"recent_share": 0.4}),
    ("r_kv", {**VOTING, "threshold": 0.3, "refresh": 2}),
    ("snapkv", VOTING),
    ("snapkv", {**VOTING, "pooling": "max"}),
    ("tova", {}),
    ("tova", {"sharing": "kv_head"}),
    ("lazy_eviction", {"alpha": 0.07, "window": 2}),
    ("tri_attention", {"window": 4}),
    ("vase", {"window": 2, "large": 0.3}),
]
NOT_PINNED = [(policy, {**options, "pin_prompt": False}) for policy, options in PEERS]
CUT = [*TOKEN_LEVEL[:1], *TOKEN_LEVEL[2:], *NOT_PINNED, PAGED[-1]]
TOKEN_LEVEL += [*PEERS, *NOT_PINNED[:6:2], *NOT_PINNED[6:]]
A_TURN = ((True, True, True, True), (False, True, False, True), (False, False, False, True))


KINDS = ("budget", "decode_budget")
KEEPERS = ("milestone", "recall")


def name_of(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(map(name_of, value))
    if isinstance(value, dict):
        return "-".join(str(item) for item in value.values()) or "default"
    return str(value)


def grid(cases: list[tuple[str, dict]], **others: tuple) -> pytest.MarkDecorator:
    """Cells as parameters: the quick ones have each case, and each combination of the rest.

    By day each case also meets each value of the first of the others, on which the sizes of a run depend.
    """
    quick = covering(cases, *others.values())
    first, *rest = others.values()
    by_pair = [(*pair, *combined) for pair, *combined in covering(itertools.product(cases, first), *rest)]
    usual = [*quick, *(cell for cell in by_pair if cell not in quick)]
    cells = slow_but(by_day(usual, itertools.product(cases, *others.values())), *quick)
    return pytest.mark.parametrize(("chosen", *others), cells, ids=name_of)


def long_case(
    policy: str, options: dict[str, object], page_size: int, kind: str, group: int, style: str
) -> Case:
    """Three rows with prompts of different lengths, a decode past the cap, a padded turn, more decoding.

    The budget has just enough room for the turn. The oracle of keeper pages knows of no turns within a budget.
    """
    prompts = (page_size + 3, 2, 2 * page_size)
    # Keepers and young pages need room to differ from a plain window.
    decode_pages = 5 if policy in KEEPERS else 2
    turn_pages = math.ceil(4 / page_size) + (page_size > 1)
    pages = decode_pages
    if kind == "budget":
        pages += math.ceil(max(prompts) / page_size) + turn_pages - 1
    turns = () if policy in KEEPERS and kind == "budget" else (A_TURN,)
    return Case(
        policy,
        options,
        **{kind: pages * page_size},
        prompts=prompts,
        then=((pages + 1) * page_size + 2, *turns, pages * page_size + 2),
        kv_heads=2,
        group=group,
        style=style,
        seed=page_size + group,
    )


@grid(PAGED + MILESTONE + RECALL, page_size=PAGE_SIZES[:3], kind=KINDS, style=("normal", "integers"))
def test_policies_with_pages(chosen: tuple[str, dict], page_size: int, kind: str, style: str) -> None:
    policy, options = chosen
    group = {1: 4, 4: 2, 8: 1}[page_size]
    assert compare(long_case(policy, {**options, "page_size": page_size}, page_size, kind, group, style)) > 1


LARGE = [
    (*first, *rest) for first, *rest in covering(itertools.product(PAGED, PAGE_SIZES[3:]), (1, 2, 4), KINDS)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "page_size", "group", "kind"),
    # A page of 32 tokens takes the ways of one of 16: by day each policy has it once, and each switch a page of 16.
    by_day([cell for cell in LARGE if cell[1] == 16 or cell[0] in PAGED[:5]], LARGE),
    ids=name_of,
)
def test_policies_with_large_pages(chosen: tuple[str, dict], page_size: int, group: int, kind: str) -> None:
    policy, options = chosen
    case = long_case(policy, {**options, "page_size": page_size}, page_size, kind, group, "normal")
    calls = 1 + sum(part if isinstance(part, int) else 1 for part in case.then)
    assert compare(case) == calls


@grid(TOKEN_LEVEL, style=("normal", "duplicates", "spiky"), kind=KINDS, group=(1, 2, 4))
def test_policies_that_work_token_by_token(
    chosen: tuple[str, dict], style: str, kind: str, group: int
) -> None:
    policy, options = chosen
    case = Case(
        policy,
        options,
        **{kind: 18 if kind == "budget" else 5},
        prompts=(11, 3, 7),
        then=(15, A_TURN, 6),
        kv_heads=2,
        group=group,
        style=style,
    )
    assert compare(case) > 1


@pytest.mark.parametrize(("policy", "options"), CUT, ids=name_of)
def test_a_prompt_over_the_budget_is_cut_after_the_prefill(policy: str, options: dict) -> None:
    page = {"page_size": 4} if policy == "raas" else {}
    case = Case(policy, {**options, **page}, budget=9, prompts=(30, 4, 17), then=(12, A_TURN, 3), kv_heads=2)
    assert compare(case) > 1


def test_dense_keeps_everything() -> None:
    assert (
        compare(Case("dense", prompts=(5, 1, 9), chunks=(4, 5), then=(7, A_TURN, 2), kv_heads=2, group=2)) > 1
    )
