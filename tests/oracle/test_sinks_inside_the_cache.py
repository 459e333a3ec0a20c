"""StreamingLLM with ``positions="cache"``: the sinks are read as if they stood right before the window.

The rotation here is written with complex numbers: pair j of a key is one number, turned by its frequency.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longthink.cache import LayerCache, Rotation
from longthink.config import Budget
from longthink.policies import StreamingLLM
from tests.examples import few, some
from tests.oracle.harness import Case, Row, compare
from tests.oracle.strategies import streaming_cases


def frequencies(dim: int) -> torch.Tensor:
    return 100.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))


class InsideCache(Case):
    def make_layer(self) -> LayerCache:
        policy = StreamingLLM(sinks=self.options["sinks"])
        budget = Budget(budget=self.budget, decode_budget=self.decode_budget)
        return LayerCache(policy, budget, rotation=Rotation(frequencies(self.dim)))


class TurnedRow(Row):
    """Reads sinks turned forward by as many positions as were evicted; the prompt reads them where they are."""

    decoding = False

    def step(self, *token: torch.Tensor, by_user: bool = False) -> torch.Tensor:
        self.decoding = True
        return super().step(*token, by_user=by_user)

    def keys_read(self, key_ND: torch.Tensor, kept_N: torch.Tensor) -> torch.Tensor:
        read_ND = key_ND[kept_N].clone()
        gone = self.oracle.length - len(self.oracle.residents()[0])
        if self.decoding:
            sinks = kept_N < self.oracle.sinks
            real, imaginary = read_ND[sinks].chunk(2, dim=-1)
            angle = gone * frequencies(key_ND.shape[1])
            turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
            read_ND[sinks] = torch.cat([turned.real, turned.imag], dim=-1)
        return read_ND


def check(case: Case) -> None:
    inside = InsideCache(**{**vars(case), "dtype": "float64", "style": "normal"})
    assert compare(inside, TurnedRow) > 1


@few(15)
@given(streaming_cases())
def test_sinks_move_with_the_window(case: Case) -> None:
    check(case)


@pytest.mark.slow
@some(40)
@given(st.data())
def test_sinks_move_with_the_window_many_times(data: st.DataObject) -> None:
    check(data.draw(streaming_cases()))
