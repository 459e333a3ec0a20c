"""The invariants of a layer's cache, stated from the rules alone."""

import itertools
import math
from dataclasses import dataclass, field

import torch

from longthink.cache import LayerCache
from tests.oracle.base import Limit
from tests.oracle.harness import DEFAULT_PAGE_SIZE, Case

PAGED = ("raas", "fifo", "recency", "random", "milestone", "recall", "quest")
UNBOUNDED = ("dense", "quest")
SINGLE_TOKENS = ("keydiff", "lazy_eviction", "r_kv", "snapkv", "tova", "tri_attention", "vase")


def page_size_of(case: Case) -> int:
    if case.policy not in PAGED:
        return 1
    return int(case.options.get("page_size", DEFAULT_PAGE_SIZE.get(case.policy, 16)))


def pins_prompt(case: Case) -> bool:
    if case.policy in ("raas", "h2o", *SINGLE_TOKENS):
        return bool(case.options.get("pin_prompt", case.policy != "h2o"))
    return case.policy in ("fifo", "recency", "random", "milestone", "recall")


def least_pages(case: Case, prompt_pages: int) -> int:
    """The smallest capacity with which a row with so many prompt pages can decode."""
    if case.policy == "streaming_llm":
        return int(case.options["sinks"]) + 1
    return prompt_pages + 1 if pins_prompt(case) else 1


def cap_in_pages(case: Case, prompt_pages: int) -> float:
    """Most pages that one row may hold; the tokens of the budget for policies without pages."""
    if case.policy in UNBOUNDED:
        return math.inf
    limit = Limit(case.budget or case.decode_budget or 0, on_top_of_prompt=case.budget is None)
    return limit.in_pages(prompt_pages, page_size_of(case))


@dataclass
class RowFacts:
    """What has been given to a row: its length, and the pages of its prompts.

    `lost` are positions before `length` that were gone when the row was rewound. Until the next token, stamps are
    those of a text of `stamped` tokens.
    """

    case: Case
    length: int = 0
    prompt_pages: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    stamped: int = 0

    def pages_with(self, tokens: int) -> set[int]:
        """Prompt pages with those of so many tokens of the user more."""
        size = page_size_of(self.case)
        return self.prompt_pages | {p // size for p in range(self.length, self.length + tokens)}

    def add(self, tokens: int, *, by_user: bool) -> None:
        if by_user:
            self.prompt_pages = self.pages_with(tokens)
        self.length += tokens
        if tokens:
            self.stamped = self.length

    def fits(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens leaves room to decode."""
        pages = len(self.pages_with(tokens))
        return cap_in_pages(self.case, pages) >= least_pages(self.case, pages)

    def rewind(self, length: int, kept: list[list[int]]) -> None:
        if length == self.length:
            return
        self.lost |= set(range(length)) - set.intersection(*map(set, kept))
        self.lost &= set(range(length))
        self.length = length
        end = math.ceil(length / page_size_of(self.case))
        self.prompt_pages = {page for page in self.prompt_pages if page < end}

    @property
    def cap(self) -> float:
        return cap_in_pages(self.case, len(self.prompt_pages))


def prompts_of(case: Case) -> list[RowFacts]:
    rows = [RowFacts(case) for _ in case.prompts]
    for row, prompt in zip(rows, case.prompts, strict=True):
        row.add(prompt, by_user=True)
    return rows


def kv_bytes_formula(case: Case, rows: list[RowFacts], item_bytes: int) -> int:
    """Rows x KV heads x slots x head dimension, for keys and values."""
    slots = max(row.cap for row in rows) * page_size_of(case)
    return 2 * len(rows) * case.kv_heads * int(slots) * case.dim * item_bytes


def check_row(case: Case, row: RowFacts, positions: list[int]) -> None:
    """What one KV head of one row keeps after any call that follows the prompt."""
    page_size, length = page_size_of(case), row.length
    kept = set(positions)
    assert all(left < right for left, right in itertools.pairwise(positions))
    assert kept <= set(range(length))
    assert len(positions) <= row.cap * page_size
    moves_tokens = case.policy in ("milestone", "recall")
    if not moves_tokens:
        assert len({position // page_size for position in positions}) <= row.cap
    tail = max(0, length - 1) // page_size
    if not (
        case.policy == "h2o" and case.options["heavy"] == 1.0
    ):  # no window: of a prompt only the heaviest stay
        assert set(range(tail * page_size, length)) - row.lost <= kept
    if pins_prompt(case) or case.policy in UNBOUNDED:
        pinned = {p for page in row.prompt_pages for p in range(page * page_size, (page + 1) * page_size)}
        assert {p for p in pinned if p < length} - row.lost <= kept
    if case.policy in UNBOUNDED:
        assert len(positions) == length
    if case.policy == "streaming_llm":
        assert set(range(min(length, int(case.options["sinks"])))) <= kept
    for page in () if moves_tokens else {position // page_size for position in positions}:
        whole_page = range(page * page_size, min((page + 1) * page_size, length))
        assert set(whole_page) - row.lost <= kept, "a page goes as a whole"


def check_layer(case: Case, layer: LayerCache, rows: list[RowFacts]) -> None:
    residents = layer.resident_positions()
    lengths = [row.length for row in rows]
    assert layer.length_B.tolist() == lengths
    assert len(residents) == len(rows)
    for row, positions_by_head in zip(rows, residents, strict=True):
        assert len(positions_by_head) == case.kv_heads
        for positions in positions_by_head:
            check_row(case, row, positions)
    kept = sum(len(positions) for row in residents for positions in row)
    assert layer.num_evicted == sum(lengths) * case.kv_heads - kept
    check_slots(layer, rows)


def check_slots(layer: LayerCache, rows: list[RowFacts]) -> None:
    """No position stands in two slots, the tail is where the next token belongs, no stamp lies in the future."""
    table, size = layer._store.table, layer.policy.page_size
    assert table.now_B.tolist() == [row.length for row in rows]
    for positions_KS, tails_K, row in zip(
        table.position_BKS.tolist(), layer._store.tail_BK.tolist(), rows, strict=True
    ):
        for positions_S, tail in zip(positions_KS, tails_K, strict=True):
            taken = [position for position in positions_S if position >= 0]
            assert len(taken) == len(set(taken))
            assert all(position < row.length for position in taken)
            first = row.length - row.length % size
            in_tail = positions_S[tail * size : (tail + 1) * size]
            expected = [p if p < row.length and p not in row.lost else -1 for p in range(first, first + size)]
            if row.length % size:
                assert [p if p not in row.lost else -1 for p in in_tail] == expected
    if "stamp" in table.state:
        for stamp_KP, row in zip(table.state["stamp"].tolist(), rows, strict=True):
            assert all(stamp <= max(0, row.stamped - 1) for stamp_P in stamp_KP for stamp in stamp_P)
    if "similar" in table.state:
        for similar_KS, row in zip(table.state["similar"], rows, strict=True):
            assert int(similar_KS.max()) <= row.stamped


def check_key_bounds(layer: LayerCache) -> None:
    """The bounds of each page are those of the keys that it holds."""
    store = layer.store
    if not store.has_key_bounds:
        return
    keys_BKPTD = store.keys_BKSD.unflatten(2, (-1, layer.policy.page_size))
    held_BKPT1 = store.table.resident_BKS.unflatten(-1, (-1, layer.policy.page_size))[..., None]
    filled_BKP1 = held_BKPT1.any(-2)
    for bound_BKPD, neutral in ((store.kmin_BKPD, torch.inf), (store.kmax_BKPD, -torch.inf)):
        found_BKPTD = torch.where(held_BKPT1, keys_BKPTD, neutral)
        found_BKPD = found_BKPTD.amin(-2) if neutral > 0 else found_BKPTD.amax(-2)
        assert torch.equal(torch.where(filled_BKP1, bound_BKPD, 0), torch.where(filled_BKP1, found_BKPD, 0))
