"""The invariants of a layer's cache, stated from the rules alone."""

import itertools
import math

from longthink.cache import LayerCache
from tests.oracle.base import Limit
from tests.oracle.harness import DEFAULT_PAGE_SIZE, Case

PAGED = ("raas", "fifo", "recency", "random", "milestone", "quest")
UNBOUNDED = ("dense", "quest")


def page_size_of(case: Case) -> int:
    if case.policy not in PAGED:
        return 1
    return int(case.options.get("page_size", DEFAULT_PAGE_SIZE.get(case.policy, 16)))


def pins_prompt(case: Case) -> bool:
    if case.policy in ("raas", "h2o"):
        return bool(case.options.get("pin_prompt", case.policy == "raas"))
    return case.policy in ("fifo", "recency", "random", "milestone")


def cap_in_pages(case: Case, prompt: int) -> float:
    """Most pages that one row may hold; the tokens of the budget for policies without pages."""
    if case.policy in UNBOUNDED:
        return math.inf
    limit = Limit(case.budget or case.decode_budget or 0, on_top_of_prompt=case.budget is None)
    return limit.in_pages(prompt, page_size_of(case))


def kv_bytes_formula(case: Case, item_bytes: int) -> int:
    """Rows x KV heads x slots x head dimension, for keys and values."""
    slots = max(cap_in_pages(case, prompt) for prompt in case.prompts) * page_size_of(case)
    return 2 * len(case.prompts) * case.kv_heads * int(slots) * case.dim * item_bytes


def check_row(case: Case, prompt: int, length: int, positions: list[int]) -> None:
    """What one KV head of one row keeps after any call that follows the prompt."""
    page_size = page_size_of(case)
    kept = set(positions)
    assert all(left < right for left, right in itertools.pairwise(positions))
    assert kept <= set(range(length))
    assert len(positions) <= cap_in_pages(case, prompt) * page_size
    moves_tokens = case.policy == "milestone"
    if not moves_tokens:
        assert len({position // page_size for position in positions}) <= cap_in_pages(case, prompt)
    tail = (length - 1) // page_size
    assert set(range(tail * page_size, length)) <= kept
    if pins_prompt(case) or case.policy in UNBOUNDED:
        assert set(range(prompt)) <= kept
    if case.policy in UNBOUNDED:
        assert len(positions) == length
    if case.policy == "streaming_llm":
        assert set(range(min(length, int(case.options["sinks"])))) <= kept
    for page in () if moves_tokens else {position // page_size for position in positions}:
        whole_page = range(page * page_size, min((page + 1) * page_size, length))
        assert set(whole_page) <= kept, "a page goes as a whole"


def check_layer(case: Case, layer: LayerCache, prompts: list[int], lengths: list[int]) -> None:
    residents = layer.resident_positions()
    assert layer.length_B.tolist() == lengths
    assert len(residents) == len(lengths)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        assert len(residents[row]) == case.kv_heads
        for positions in residents[row]:
            check_row(case, prompt, length, positions)
    kept = sum(len(positions) for row in residents for positions in row)
    assert layer.num_evicted == sum(lengths) * case.kv_heads - kept
    check_slots(layer, lengths)


def check_slots(layer: LayerCache, lengths: list[int]) -> None:
    """A position stands in one slot at most, and no stamp lies in the future."""
    table = layer._store.table
    for positions_KS, length in zip(table.position_BKS.tolist(), lengths, strict=True):
        for positions_S in positions_KS:
            taken = [position for position in positions_S if position >= 0]
            assert len(taken) == len(set(taken))
            assert all(position < length for position in taken)
    if "stamp" in table.state:
        for stamp_KP, length in zip(table.state["stamp"].tolist(), lengths, strict=True):
            assert all(stamp < length for stamp_P in stamp_KP for stamp in stamp_P)
