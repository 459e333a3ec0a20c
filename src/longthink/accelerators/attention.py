"""Append, attention and scores of a decode step in two launches per layer (three where pages are selected).

Shape suffixes: B rows, K KV heads, G query heads per KV head, P page slots, S token slots, D head dim.
"""

from torch import Tensor

from longthink.cache.store import SlotStore
from longthink.kernels.operators import operator
from longthink.kernels.triton_decode import SideOutput, Slots, floats, plan_work, split
from longthink.kernels.triton_decode import combine as combine_splits

NOTHING = SideOutput()
BOUND = SideOutput(bound=1)  # bound score of each page, maximum over the group, -inf where the page is empty
BOUND_SHARE = SideOutput(bound=2, combine=2)
"""Softmax of the bound scores over the pages, maximum over the group."""
MASS = SideOutput(score=1, combine=1)  # attention share of each page, maximum over the group


def marks(state_BKS: Tensor, alpha: float, near: int) -> SideOutput:
    """Write 1 where a token more than `near` positions back has more than `alpha` of a query's attention (int8)."""
    return SideOutput(score=3, combine=4, state_BKS=state_BKS, alpha=alpha, near=near)


def sums(state_BKS: Tensor) -> SideOutput:
    """Accumulate the attention of each token, summed over the group (float32)."""
    return SideOutput(score=2, combine=5, state_BKS=state_BKS)


def slots_of(store: SlotStore) -> Slots:
    table = store.table
    bounds = (store.kmin_BKPD, store.kmax_BKPD) if store.has_key_bounds else (None, None)
    held = (store.keys_BKSD, store.values_BKSD, table.position_BKS, store.tail_BK, table.now_B)
    return Slots(*held, table.page_size, *bounds)


def step_attention(
    query_BKGD: Tensor, key_BKD: Tensor, value_BKD: Tensor, slots: Slots, scaling: float,
    side: SideOutput = NOTHING, score_BKP: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Append the token at `now_B`, attend to the resident tokens, and write side outputs.

    A token at offset 0 clears its page. Returns the output BKGD, and the page scores that `side` asks for (in
    `score_BKP`, float32, if it is given) or None.
    """
    if not (side.bound or side.score == 1):
        score_BKP = None
    elif score_BKP is None:
        pages = slots.keys_BKSD.shape[2] // slots.page_size
        score_BKP = floats(query_BKGD, (*query_BKGD.shape[:2], pages))
    return _step(query_BKGD, key_BKD, value_BKD, *slots, scaling, *side, score_BKP), score_BKP


@operator("step_attention", mutates=("keys", "values", "position", "kmin", "kmax", "state", "page_score"))
def _step(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, position: Tensor, tail: Tensor,
    now: Tensor, page_size: int, kmin: Tensor | None, kmax: Tensor | None, scaling: float, score: int, combine: int,
    bound: int, state: Tensor | None, alpha: float, near: int, page_score: Tensor | None,
) -> Tensor:  # fmt: skip
    """`step_attention` with the fields of `Slots` and `SideOutput`; page scores go to `page_score`, if wanted."""
    slots = Slots(keys, values, position, tail, now, page_size, kmin, kmax)
    side = SideOutput(score, combine, bound, state, alpha, near)
    work = plan_work(query, key, value, slots)
    rows, heads, groups, _ = query.shape
    result = scored = query if page_score is None else page_score
    if bound == 2 or score in (1, 3):  # per query head, until the splits are combined
        scored = floats(query, (rows, heads, groups, work.tokens // page_size))
        result = scored if page_score is None else page_score
    logit = floats(query, (rows, heads, groups, work.tokens)) if score > 1 else query
    partial, share = split(work, slots, scored, logit, scaling, side, append=True)
    return combine_splits(work, slots, partial, share, logit, scored, result, side).to(query.dtype)


def select_attention(
    query_BKGD: Tensor, key_BKD: Tensor, value_BKD: Tensor, slots: Slots, cap_B: Tensor, scaling: float
) -> Tensor:
    """Append the token at `now_B` and attend to the tail and the pages with the highest bounds, `cap_B` in all. BKGD.

    For caches that grow: slot p holds page p, so a tie goes to the lower slot.
    """
    return _select(query_BKGD, key_BKD, value_BKD, *slots, cap_B, scaling)


@operator("select_attention", mutates=("keys", "values", "position", "kmin", "kmax"))
def _select(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, position: Tensor, tail: Tensor,
    now: Tensor, page_size: int, kmin: Tensor, kmax: Tensor, cap: Tensor, scaling: float,
) -> Tensor:  # fmt: skip
    slots = Slots(keys, values, position, tail, now, page_size, kmin, kmax)
    work = plan_work(query, key, value, slots)
    score = floats(query, (*query.shape[:2], work.tokens // work.page_size))
    split(work, slots, score, score, scaling, BOUND, append=True, attend=False)
    partial, share = split(work, slots, score, score, scaling, NOTHING, cap)
    return combine_splits(work, slots, partial, share, score, score, score, NOTHING).to(query.dtype)
