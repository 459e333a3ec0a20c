"""Hypothesis strategies for cases: every policy with every switch, so small that evictions come soon."""

import math
from collections.abc import Callable

from hypothesis import strategies as st

from tests.oracle.harness import Case, Turn

PAGE_SIZES = (1, 4, 8)
FRACTIONS = (0.1, 0.25, 0.3, 0.5, 0.55, 0.75, 1.0)
STYLES = ("normal", "integers", "duplicates", "spiky")
PINNED = ("raas", "recency", "fifo", "random", "milestone", "recall")

Draw = Callable[[st.SearchStrategy], object]


@st.composite
def turns(draw: Draw, rows: int) -> Turn:
    width = draw(st.integers(2, 5))
    flags = st.lists(st.booleans(), min_size=width, max_size=width).map(tuple)
    return tuple(draw(flags) for _ in range(rows))


def user_pages(shape: dict[str, object], page_size: int) -> int:
    """The most pages that the prompts of all turns can touch in a row."""
    widths = [len(part[0]) for part in shape["then"] if not isinstance(part, int)]
    # A turn may begin and end in the middle of a page.
    turns = sum((width + 2 * page_size - 2) // page_size for width in widths)
    return math.ceil(max(shape["prompts"]) / page_size) + turns


@st.composite
def budgets(draw: Draw, shape: dict[str, object], page_size: int, least_pages: int) -> dict[str, int]:
    """A budget whose pages hold, not always exactly, `least_pages` or a few more."""
    slack = draw(st.integers(0, page_size - 1))
    if draw(st.booleans()):
        pages = draw(st.integers(least_pages, max(least_pages, user_pages(shape, page_size)) + 1))
        return {"budget": pages * page_size + slack}
    return {"decode_budget": draw(st.sampled_from((1, 2, 2, 3))) * page_size - slack}


@st.composite
def shapes(draw: Draw, page_size: int, *, chunked: bool) -> dict[str, object]:
    rows = draw(st.integers(1, 3))
    prompts = tuple(draw(st.integers(1, 2 * page_size + 3)) for _ in range(rows))
    width = max(prompts)
    chunks: tuple[int, ...] = ()
    if chunked and width >= 2 and draw(st.booleans()):
        first = draw(st.integers(1, width - 1))
        chunks = (first, width - first)
    steps = st.integers(2 * page_size + 2, 5 * page_size + 6)
    parts = draw(st.lists(st.one_of(steps, turns(rows)), max_size=2))
    return {
        "prompts": prompts,
        "chunks": chunks,
        "then": (draw(steps), *parts),
        "kv_heads": draw(st.integers(1, 2)),
        "group": draw(st.sampled_from((1, 2, 4))),
        "dim": draw(st.sampled_from((4, 8))),
        "scaling": draw(st.sampled_from((None, 1.0, 0.25))),
        "style": draw(st.sampled_from(STYLES)),
        "dtype": draw(st.sampled_from(("float64", "float32"))),
        "seed": draw(st.integers(0, 2**16)),
    }


@st.composite
def page_cases(
    draw: Draw, policy: str, options: dict[str, object], page_sizes: tuple[int, ...] = PAGE_SIZES
) -> Case:
    """Cases of a policy with pages; `options` are its other switches."""
    page_size = draw(st.sampled_from(page_sizes))
    pinned = policy in PINNED and options.get("pin_prompt", True)
    shape = draw(shapes(page_size, chunked=bool(pinned) or policy == "quest"))
    least = user_pages(shape, page_size) + 1 if pinned else 1
    budget = draw(budgets(shape, page_size, least))
    return Case(policy, {**options, "page_size": page_size}, **budget, **shape)


@st.composite
def raas_options(draw: Draw) -> dict[str, object]:
    options: dict[str, object] = {
        "score": draw(st.sampled_from(("bound", "exact"))),
        "sharing": draw(st.sampled_from(("kv_head", "layer"))),
        "pin_prompt": draw(st.booleans()),
    }
    if draw(st.booleans()):
        return {**options, "used": "top_r", "r": draw(st.sampled_from(FRACTIONS))}
    return {**options, "used": "alpha", "alpha": draw(st.sampled_from((1e-4, 0.05, 0.125, 0.25)))}


@st.composite
def raas_cases(draw: Draw) -> Case:
    return draw(page_cases("raas", draw(raas_options())))


@st.composite
def control_cases(draw: Draw) -> Case:
    """fifo, recency and random."""
    policy = draw(st.sampled_from(("fifo", "recency", "random")))
    options = {"seed": draw(st.integers(0, 2**31 - 1))} if policy == "random" else {}
    return draw(page_cases(policy, options))


@st.composite
def milestone_cases(draw: Draw) -> Case:
    """Milestone and recall: decode pages enough for both generations, and decoding long enough for many promotions.

    Their oracle knows of several turns only where they take nothing from the decode pages.
    """
    policy, page_size = draw(st.sampled_from(("milestone", "recall"))), draw(st.sampled_from(PAGE_SIZES))
    options = {
        "page_size": page_size,
        "keep": draw(st.sampled_from((0.0, 0.3, 0.5, 0.8, 1.0))),
        "young": draw(st.sampled_from((1, page_size, 2 * page_size, 32))),
        "alpha": draw(st.sampled_from((0.1, 0.2, 0.5))),
        "ridge": draw(st.sampled_from((0.003, 0.1))),
    }
    if policy == "recall":
        options["memory"] = draw(st.sampled_from((2, 8, 100)))
        options["window"] = draw(st.sampled_from((0.0, 0.3, 0.5, 1.0)))
        options["head_start"] = draw(st.sampled_from((0.0, 0.05, 1.0)))
    shape = draw(shapes(page_size, chunked=True))
    decode_pages = draw(st.integers(1, 5))
    steps = draw(st.integers((decode_pages + 1) * page_size, (decode_pages + 5) * page_size + 6))
    shape["then"] = (steps, *shape["then"][1:])
    if draw(st.booleans()):
        shape["then"] = tuple(part for part in shape["then"] if isinstance(part, int))
        pages = decode_pages + math.ceil(max(shape["prompts"]) / page_size)
        return Case(policy, options, budget=pages * page_size, **shape)
    budget = {"decode_budget": decode_pages * page_size}
    return Case(policy, options, **budget, **shape)


@st.composite
def h2o_cases(draw: Draw) -> Case:
    options = {"heavy": draw(st.sampled_from((0.0, 0.3, 0.5, 0.75, 1.0))), "pin_prompt": draw(st.booleans())}
    shape = draw(shapes(3, chunked=bool(options["pin_prompt"])))
    least = user_pages(shape, 1) + 1 if options["pin_prompt"] else 2
    return Case("h2o", options, **draw(budgets(shape, 1, least)), **shape)


def token_budgets(shape: dict[str, object], *, pinned: bool) -> st.SearchStrategy[dict[str, int]]:
    """Room for several tokens that compete, besides the prompts of all turns where they are pinned."""
    least = (user_pages(shape, 1) if pinned else 0) + 4
    return st.one_of(
        st.fixed_dictionaries({"budget": st.integers(least, least + 8)}),
        st.fixed_dictionaries({"decode_budget": st.integers(1, 10)}),
    )


@st.composite
def lazy_eviction_cases(draw: Draw) -> Case:
    options = {
        "alpha": draw(st.sampled_from((0.05, 0.125, 0.25))),
        "window": draw(st.sampled_from((1, 2, 5, 64))),
        "pin_prompt": draw(st.booleans()),
    }
    shape = draw(shapes(5, chunked=bool(options["pin_prompt"])))
    return Case(
        "lazy_eviction", options, **draw(token_budgets(shape, pinned=bool(options["pin_prompt"]))), **shape
    )


@st.composite
def tri_attention_cases(draw: Draw) -> Case:
    options = {"window": draw(st.sampled_from((1, 2, 5))), "pin_prompt": draw(st.booleans())}
    shape = draw(shapes(4, chunked=bool(options["pin_prompt"])))
    budget = draw(token_budgets(shape, pinned=bool(options["pin_prompt"])))
    return Case("tri_attention", options, **budget, **shape)


@st.composite
def vase_cases(draw: Draw) -> Case:
    options = {
        "window": draw(st.sampled_from((1, 2, 3, 5))),
        "large": draw(st.sampled_from((0.0, 0.3, 0.5, 1.0))),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "pin_prompt": draw(st.booleans()),
    }
    shape = draw(shapes(5, chunked=bool(options["pin_prompt"])))
    return Case("vase", options, **draw(token_budgets(shape, pinned=bool(options["pin_prompt"]))), **shape)


@st.composite
def streaming_cases(draw: Draw) -> Case:
    sinks = draw(st.integers(0, 5))
    shape = draw(shapes(4, chunked=False))
    # With a decode budget every row must still hold the sinks and one token.
    if draw(st.booleans()):
        least = max(1, sinks + 1 - min(shape["prompts"]))
        budget = {"decode_budget": draw(st.integers(least, least + 6))}
    else:
        budget = {"budget": draw(st.integers(sinks + 1, sinks + 10))}
    return Case("streaming_llm", {"sinks": sinks, "positions": "logical"}, **budget, **shape)


@st.composite
def token_options(draw: Draw, policy: str) -> dict[str, object]:
    options: dict[str, object] = {"pin_prompt": draw(st.booleans())}
    if policy == "keydiff":
        return {**options, "recent_share": draw(st.sampled_from((0.0, 0.2, 0.55, 1.0)))}
    if policy == "tova":
        return {**options, "sharing": draw(st.sampled_from(("kv_head", "layer")))}
    options |= {"window": draw(st.sampled_from((1, 3, 32))), "kernel": draw(st.sampled_from((1, 3, 7)))}
    if policy == "snapkv":
        return {**options, "pooling": draw(st.sampled_from(("avg", "max")))}
    # Cosines of the integer styles are often 0.5.
    threshold, refresh = draw(st.sampled_from((-0.3, 0.3, 0.8))), draw(st.sampled_from((1, 3, 8)))
    return {**options, "lam": draw(st.sampled_from(FRACTIONS)), "threshold": threshold, "refresh": refresh}


@st.composite
def token_cases(draw: Draw) -> Case:
    """keydiff, r_kv, snapkv and tova."""
    policy = draw(st.sampled_from(("keydiff", "r_kv", "snapkv", "tova")))
    options = draw(token_options(policy))
    shape = draw(shapes(3, chunked=bool(options["pin_prompt"])))
    least = user_pages(shape, 1) + 1 if options["pin_prompt"] else 2
    budget = draw(budgets(shape, 1, least))
    # Short budgets of the pages would leave nothing to choose from.
    return Case(policy, options, **{kind: tokens + 4 for kind, tokens in budget.items()}, **shape)


@st.composite
def whole_cases(draw: Draw) -> Case:
    """quest and dense: nothing is ever evicted."""
    if draw(st.integers(0, 3)):
        return draw(page_cases("quest", {}))
    return Case("dense", **draw(shapes(4, chunked=True)))


def all_cases() -> st.SearchStrategy[Case]:
    families = (
        raas_cases,
        control_cases,
        milestone_cases,
        h2o_cases,
        lazy_eviction_cases,
        streaming_cases,
        token_cases,
        tri_attention_cases,
        vase_cases,
        whole_cases,
    )
    return st.one_of(*(family() for family in families))
