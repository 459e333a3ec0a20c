"""The contract of a policy has room for generations: a toy policy that saves tokens from the page that goes.

Shape suffixes: B rows, K KV heads, T tokens in a page, S token slots, W = 2 * T.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longthink.cache import LayerCache
from longthink.config import Budget
from longthink.policies import Moves, PageTable, Policy, Shape, Step
from tests.examples import few, some
from tests.oracle.base import Heads, Limit, Setting, Vector, softmax
from tests.oracle.harness import TIE_TOLERANCE, Case, compare
from tests.oracle.milestone import YoungPagesOracle
from tests.oracle.strategies import STYLES, turns

PAGE = 4


@dataclass(frozen=True, kw_only=True)
class Promotion(Policy):
    """The first decode page becomes an old generation: of it and of the page that goes, the heaviest tokens stay.

    Differs from the paper: there is none, this is a test.
    """

    name: ClassVar[str] = "promotion"
    page_size: int = PAGE

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"weights"})

    def required_pages(self, prompt: int) -> int:
        return -(-prompt // self.page_size) + 2

    def init_state(self, shape: Shape, device: torch.device) -> dict[str, torch.Tensor]:
        slots = shape.P * shape.T
        return {"mass": torch.zeros(shape.B, shape.K, slots, dtype=torch.float64, device=device)}

    def old_page_B(self, table: PageTable) -> torch.Tensor:
        """The slot after those of the prompt: the first one that a decode token opens."""
        return (table.prompt_B + self.page_size - 1) // self.page_size

    def protected(self, table: PageTable) -> torch.Tensor:
        slots = torch.arange(table.page_BKP.shape[-1])
        return super().protected(table) | (slots == self.old_page_B(table)[:, None, None])

    def moves(self, table: PageTable, slot_BK: torch.Tensor, full_BK: torch.Tensor) -> Moves:
        within = torch.arange(self.page_size)
        going_BKT = slot_BK[..., None] * self.page_size + within
        old_BKT = (self.old_page_B(table)[:, None, None] * self.page_size + within).expand_as(going_BKT)
        kept_BKW = self.heaviest(table, torch.cat([old_BKT, going_BKT], -1))
        promoted_BKT = kept_BKW[..., self.page_size :] & full_BK[..., None]
        demoted_BKT = ~kept_BKW[..., : self.page_size]
        room_BKT = old_BKT.gather(-1, demoted_BKT.int().argsort(dim=-1, descending=True, stable=True))
        place_BKT = room_BKT.gather(-1, (promoted_BKT.cumsum(-1) - 1).clamp(min=0))
        return Moves(going_BKT, torch.where(promoted_BKT, place_BKT, going_BKT))

    def heaviest(self, table: PageTable, token_BKW: torch.Tensor) -> torch.Tensor:
        """Mark the better half of these tokens by mass, a tie going to the lower position."""
        by_position = table.position_BKS.gather(-1, token_BKW).argsort(-1)
        mass_BKW = table.state["mass"].gather(-1, token_BKW).gather(-1, by_position)
        order = by_position.gather(-1, mass_BKW.argsort(dim=-1, descending=True, stable=True))
        return order.argsort(-1) < self.page_size

    def observe(self, table: PageTable, step: Step) -> None:
        table.state["mass"] += step.weights_BKGS.sum(2)


class PromotionOracle(YoungPagesOracle):
    """Per KV head three lists of positions: pinned, the old generation, and the young pages in order."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, PAGE)
        self.old: list[list[int]] = [[] for _ in range(self.heads.kv)]
        self.mass: list[dict[int, float]] = [{} for _ in range(self.heads.kv)]

    def step(self, query: list[Vector], key: list[Vector]) -> None:
        now = self.length
        self.append(key)
        for kv_head in range(self.heads.kv):
            if now not in self.pinned():
                self.place(kv_head, now)
            self.mass[kv_head][now] = 0.0
            positions = self.residents()[kv_head]
            for query_head in self.heads.queries_of(kv_head):
                for position, share in softmax(self.logits(query[query_head], kv_head, positions)).items():
                    self.mass[kv_head][position] = self.mass[kv_head].get(position, 0.0) + share

    def place(self, kv_head: int, now: int) -> None:
        old, young = self.old[kv_head], self.young[kv_head]
        if len(old) < PAGE:
            old.append(now)
            return
        if now % PAGE == 0:
            slots_left = self.capacity() - len(self.prompt_pages | self.coming_pages) - 1
            if len(young) >= slots_left:
                mass = self.mass[kv_head]
                self.old[kv_head] = sorted(self.best({p: mass[p] for p in old + young.pop(0)}, PAGE))
            young.append([])
        young[-1].append(now)

    def residents(self) -> list[list[int]]:
        generations = zip(self.old, self.young, strict=True)
        return [
            sorted([*self.pinned(), *old, *(p for page in young for p in page)]) for old, young in generations
        ]


class PromotionCase(Case):
    def make_layer(self) -> LayerCache:
        return LayerCache(Promotion(), Budget(budget=self.budget, decode_budget=self.decode_budget))

    def make_oracle(self) -> PromotionOracle:
        limit = Limit(self.budget or self.decode_budget or 0, on_top_of_prompt=self.budget is None)
        heads = Heads(self.kv_heads, self.group)
        return PromotionOracle(Setting(limit, heads, self.dim**-0.5, TIE_TOLERANCE[self.dtype]))


@st.composite
def promotion_cases(draw: st.DrawFn) -> PromotionCase:
    rows = draw(st.integers(1, 3))
    prompts = tuple(draw(st.integers(1, 9)) for _ in range(rows))
    prompt_pages = -(-max(prompts) // PAGE)
    on_top = draw(st.booleans())
    tokens = PAGE * (draw(st.integers(2, 4)) + (0 if on_top else prompt_pages))
    return PromotionCase(
        "promotion",
        **{"decode_budget" if on_top else "budget": tokens},
        prompts=prompts,
        then=(draw(st.integers(16, 40)), *([draw(turns(rows))] if on_top else ()), draw(st.integers(1, 20))),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from((1, 2))),
        style=draw(st.sampled_from(STYLES)),
        seed=draw(st.integers(0, 2**16)),
    )


def check(case: PromotionCase) -> None:
    assert compare(case) > 1


@few(15)
@given(promotion_cases())
def test_promoted_tokens_outlive_their_page(case: PromotionCase) -> None:
    check(case)


@pytest.mark.slow
@some(40)
@given(promotion_cases())
def test_promoted_tokens_outlive_their_page_many_times(case: PromotionCase) -> None:
    check(case)


def test_a_token_that_is_read_for_ever_is_never_lost() -> None:
    layer = LayerCache(Promotion(), Budget(decode_budget=3 * PAGE))
    loud = torch.tensor([30.0, 0.0]).view(1, 1, 1, 2)
    quiet = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    for position in range(60):
        key = loud if position == 10 else quiet
        layer.attend(loud, key, key)
    assert 10 in layer.resident_positions()[0][0]
    assert layer.kv_bytes == 2 * 4 * PAGE * 2 * 4
