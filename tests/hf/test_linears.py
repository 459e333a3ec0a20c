"""Linear layers of a compiled step: the same numbers, by what is faster for few rows."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from longthink.hf import linears
from tests.grids import covering, slow_but

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
GRID = ((1, 2, linears.FEW_ROWS, linears.FEW_ROWS + 1, 16), TOLERANCE, (False, True))


@pytest.fixture
def replaced(monkeypatch):
    """What the graph calls in place of linear layers, without the compiler behind it."""
    called = []

    def take(name):
        def backend(module, inputs):
            called.extend(node.target for node in module.graph.nodes if node.op == "call_function")
            return module.forward

        return backend

    monkeypatch.setattr(linears, "lookup_backend", take)
    yield called
    torch.compiler.reset()


def product(rows, dtype, bias, width=24, out=40):
    drawn = torch.Generator().manual_seed(rows)
    value, weight, added = (
        torch.randn(*s, generator=drawn).to(dtype) for s in ((rows, 1, width), (out, width), (out,))
    )
    return value, weight, added if bias else None


@pytest.mark.parametrize(("rows", "dtype", "bias"), slow_but(itertools.product(*GRID), *covering(*GRID)))
def test_the_numbers_are_those_of_a_linear_layer(rows, dtype, bias, replaced):
    operands = product(rows, dtype, bias)
    made = torch.compile(lambda *given: F.linear(*given), backend=linears.few_rows_backend, fullgraph=True)(
        *operands
    )
    wanted = F.linear(*(None if one is None else one.double() for one in operands))
    assert made.dtype == dtype and made.shape == wanted.shape
    assert (made.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()
    if rows <= linears.FEW_ROWS:
        assert replaced.count(torch.sum) == rows and F.linear not in replaced
    else:
        assert F.linear in replaced


def test_arguments_may_have_names(replaced):
    value, weight, bias = product(2, torch.float64, True)
    named = torch.compile(
        lambda x, w, b: F.linear(input=x, weight=w, bias=b), backend=linears.few_rows_backend, fullgraph=True
    )
    torch.testing.assert_close(named(value, weight, bias), F.linear(value, weight, bias))
    assert F.linear not in replaced


def test_a_length_that_changes_keeps_its_linear_layer(replaced):
    value, weight, bias = product(12, torch.float64, True)
    torch._dynamo.mark_dynamic(value, 0)
    made = torch.compile(lambda *given: F.linear(*given), backend=linears.few_rows_backend, fullgraph=True)
    torch.testing.assert_close(made(value, weight, bias), F.linear(value, weight, bias))
    assert F.linear in replaced


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 6])
def test_the_compiler_takes_what_is_put_in(rows):
    value, weight, bias = product(rows, torch.float32, True)
    made = torch.compile(
        lambda *given: F.linear(*given).relu(), backend=linears.few_rows_backend, fullgraph=True
    )
    torch.testing.assert_close(made(value, weight, bias), F.linear(value, weight, bias).relu())
