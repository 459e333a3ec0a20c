"""`TieredCache` against its oracle: what stays, where it is packed, and what every step reads."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, given
from hypothesis import strategies as st

from longthink.cache import TieredCache, with_pages
from longthink.config import Budget, KvBits
from longthink.policies import make_policy
from tests.examples import few, some
from tests.grids import slow_but
from tests.oracle.tiers import TieredRow

DIM, HEADS, GROUP, SCALING = 8, 2, 2, 0.5


@dataclass(frozen=True)
class TieredCase:
    rule: str
    kv_bits: KvBits
    budget: tuple[str, int]
    prompts: tuple[int, ...]
    steps: int
    seed: int = 0

    def layer(self, policy=None) -> TieredCache:
        policy = with_pages(make_policy(policy or self.rule), self.kv_bits)
        return TieredCache(
            policy, Budget(**dict([self.budget])), kv_bits=self.kv_bits, head_dim=DIM, dtype=torch.float64
        )

    def rows(self) -> list[list[TieredRow]]:
        bits, stays = self.kv_bits, self.kv_bits.prompt == "full"
        return [
            [
                TieredRow(
                    bits=(bits.keys, bits.values), page=bits.page, window=bits.window, dim=DIM, item=8,
                    budget=self.budget, prompt_stays=stays, rule=self.rule,
                )
                for _ in range(HEADS)
            ]
            for _ in self.prompts
        ]  # fmt: skip

    def columns(self, width: int, generator: torch.Generator) -> list[torch.Tensor]:
        rows = len(self.prompts)
        return [
            torch.randn(rows, heads, width, DIM, generator=generator, dtype=torch.float64)
            for heads in (HEADS * GROUP, HEADS, HEADS)
        ]


def compare(case: TieredCase) -> TieredCache:
    generator = torch.Generator().manual_seed(case.seed)
    layer, rows, width = case.layer(), case.rows(), max(case.prompts)
    query, key, value = case.columns(width, generator)
    real = torch.arange(width) >= width - torch.tensor(case.prompts)[:, None]
    layer.attend(query, key, value, real, SCALING)
    for b, (heads, length) in enumerate(zip(rows, case.prompts, strict=True)):
        for k, row in enumerate(heads):
            asked = query[b, k * GROUP : (k + 1) * GROUP, width - length :].flatten(0, 1)
            row.prefill(
                *(block.tolist() for block in (asked, *(x[b, k, width - length :] for x in (key, value))))
            )
    held = layer.kv_bytes
    for _ in range(case.steps):
        query, key, value = case.columns(1, generator)
        out = layer.attend(query, key, value, None, SCALING)
        for b, heads in enumerate(rows):
            for k, row in enumerate(heads):
                asked = query[b, k * GROUP : (k + 1) * GROUP, 0].tolist()
                expected = row.step(asked, key[b, k, 0].tolist(), value[b, k, 0].tolist(), SCALING)
                found = out[b, k * GROUP : (k + 1) * GROUP, 0]
                torch.testing.assert_close(
                    found, torch.tensor(expected, dtype=found.dtype), atol=1e-9, rtol=1e-9
                )
                assert layer.resident_positions()[b][k] == row.positions()
    assert layer.kv_bytes == held
    return layer


@st.composite
def cases(draw):
    page = draw(st.sampled_from([16, 32]))
    window = page * draw(st.integers(1, 2))
    prompt = draw(st.sampled_from(["full", "packed"]))
    kv_bits = KvBits(
        keys=draw(st.sampled_from([8, 4, 3, 2])), values=draw(st.sampled_from([8, 4, 3, 2])), window=window,
        page=page, prompt=prompt,
    )  # fmt: skip
    prompts = tuple(draw(st.lists(st.integers(1, 70), min_size=1, max_size=3)))
    more = window + page * draw(st.integers(1, 2))
    total = window + page * (-(-max(prompts) // page) + draw(st.integers(1, 2)))
    budget = draw(st.sampled_from([("decode_budget", more), ("budget", total)]))
    return TieredCase(
        rule=draw(st.sampled_from(["recency", "raas"])), kv_bits=kv_bits, budget=budget, prompts=prompts,
        steps=draw(st.integers(20, 300)), seed=draw(st.integers(0, 1000)),
    )  # fmt: skip


@few(2, phases=[Phase.generate])
@given(cases())
def test_a_row_keeps_and_reads_what_its_oracle_does(case):
    compare(case)


@pytest.mark.slow
@some(12, phases=[Phase.generate])
@given(cases())
def test_a_row_keeps_and_reads_what_its_oracle_does_many_times(case):
    compare(case)


def test_rows_with_longer_prompts_have_fewer_packed_pages():
    bits = KvBits(keys=8, values=8, window=16, page=16)
    layer = compare(TieredCase("recency", bits, ("budget", 80), (40, 24), 220))
    packed = (layer.tiers.table.page_BKP[..., layer.tiers.full_pages :] >= 0).sum(-1)
    assert packed[0, 0] < packed[1, 0] == layer.tiers.packed_pages


@pytest.mark.parametrize("rule", slow_but(["recency", "raas"], "raas"))
def test_pages_are_packed_and_evicted(rule):
    bits = KvBits(keys=4, values=2, window=16, page=16)
    layer = compare(TieredCase(rule, bits, ("decode_budget", 32), (20, 5), 200))
    assert layer.num_evicted > 0
    assert layer.tiers.full_pages == 3
    assert (layer.tiers.table.page_BKP >= 0).all(-1)[0].all()


def test_a_page_in_full_stays_however_little_it_is_worth():
    """The window has two pages here, and the older one is at times the least used of all pages."""
    compare(
        TieredCase(
            "raas", KvBits(keys=4, values=2, window=32, page=16), ("decode_budget", 48), (15,), steps=300
        )
    )
