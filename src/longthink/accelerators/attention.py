"""Append, attention and scores of a decode step in two launches per layer (three where pages are selected).

Shape suffixes: B rows, K KV heads, G query heads per KV head, P page slots, S token slots, D head dim.
"""

from torch import Tensor

from longthink.cache.store import SlotStore
from longthink.kernels.triton_decode import SideOutput, Slots, combine, floats, plan_work, split

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
    work = plan_work(query_BKGD, key_BKD, value_BKD, slots)
    rows, heads, groups, _ = query_BKGD.shape
    pages = work.tokens // work.page_size
    if not (side.bound or side.score == 1):
        score_BKP = None
    elif score_BKP is None:
        score_BKP = floats(query_BKGD, (rows, heads, pages))
    per_head = side.bound == 2 or side.score in (1, 3)
    score = query_BKGD if score_BKP is None else score_BKP
    if per_head:
        score = floats(query_BKGD, (rows, heads, groups, pages))
    logit = floats(query_BKGD, (rows, heads, groups, work.tokens)) if side.score > 1 else query_BKGD
    partial, share = split(work, slots, score, logit, scaling, side, append=True)
    result = score if score_BKP is None else score_BKP
    out_BKGD = combine(work, slots, partial, share, logit, score, result, side)
    return out_BKGD.to(query_BKGD.dtype), score_BKP


def select_attention(
    query_BKGD: Tensor, key_BKD: Tensor, value_BKD: Tensor, slots: Slots, cap_B: Tensor, scaling: float
) -> Tensor:
    """Append the token at `now_B` and attend to the tail and the pages with the highest bounds, `cap_B` in all. BKGD.

    For caches that grow: slot p holds page p, so a tie goes to the lower slot.
    """
    work = plan_work(query_BKGD, key_BKD, value_BKD, slots)
    score = floats(query_BKGD, (*query_BKGD.shape[:2], work.tokens // work.page_size))
    split(work, slots, score, score, scaling, BOUND, append=True, attend=False)
    partial, share = split(work, slots, score, score, scaling, NOTHING, cap_B)
    return combine(work, slots, partial, share, score, score, score, NOTHING).to(query_BKGD.dtype)
