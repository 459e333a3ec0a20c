"""The benchmark of kernels: what it runs, on a CPU with a made-up clock; the numbers themselves need a GPU."""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from bench import kernels
from longthink.errors import BenchError

CPU = torch.device("cpu")


@pytest.fixture
def launches():
    """Launches of our own kernels, which cannot run here: `tests/kernels` has them in an interpreter."""
    pytest.importorskip("triton")
    from tests.kernels.launches import recorded

    with recorded() as found:
        yield found


def run(**changes):
    calls = []

    def clock(call):
        calls.append(call())
        return 2.0

    options = {"rows": (1, 3), "lengths": (48,), "budgets": (32, 64)} | changes
    return list(kernels.times(**options, device=CPU, clock=clock)), calls


@pytest.mark.slow
def test_every_system_at_every_shape(launches):
    found, calls = run()
    assert {row.model for row in found} == {"Qwen2.5-7B", "Qwen2.5-1.5B"}
    assert {row.system for row in found} == {f"longthink {kind}" for kind in kernels.STATISTICS} | {
        "sdpa",
        "flex",
    }
    assert len(found) == 2 * 2 * (4 * 2 + 2) == len(calls) - 1  # one call is the copy
    assert {(row.rows, row.tokens) for row in found if row.system == "flex"} == {(1, 48), (3, 48)}
    assert {row.tokens for row in found if row.system == "longthink mass"} == {32, 64}
    assert len(launches) == 2 * sum(row.system.startswith("longthink") for row in found)


@pytest.mark.slow
def test_bandwidth_counts_keys_and_values_once(launches):
    found, _ = run(rows=(3,))
    row = next(row for row in found if row.model == "Qwen2.5-7B" and row.tokens == 64)
    assert row.ms == 2.0
    assert row.gb_per_s == pytest.approx(2 * 3 * 4 * 64 * 128 * 2 / 2e-3 / 1e9)
    assert row.of_copy == pytest.approx(row.gb_per_s / (2 * 1024 * 2 / 2e-3 / 1e9))


@pytest.mark.slow
def test_dense_kernels_agree():
    case = kernels.Case(4, 2, 16, 2, 48)
    outs = []
    for make in (kernels._sdpa, kernels._flex):
        torch.manual_seed(1)
        outs.append(make(case, CPU)()[:, :, 0].float())
    torch.testing.assert_close(outs[1], outs[0], atol=1.6e-2, rtol=1.6e-2)


def test_flashinfer_gets_its_pages(monkeypatch):
    """With a stand-in for the package, which cannot be installed without a GPU, that attends as its manual says."""

    class Wrapper:
        def __init__(self, workspace, layout, use_tensor_cores):
            assert layout == "NHD"

        def plan(self, first, blocks, last, heads, kv_heads, dim, page, *, q_data_type, kv_data_type):
            self.plan_ = first.tolist(), blocks, last.tolist(), page

        def run(self, query, paged):
            first, blocks, last, page = self.plan_
            assert set(last) == {page}
            rows = [paged[blocks[a:b].long()] for a, b in pairwise(first)]
            keys, values = (
                torch.stack([row[:, i].flatten(0, 1) for row in rows]).transpose(1, 2) for i in (0, 1)
            )
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(query[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    package = ModuleType("flashinfer")
    package.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    case, outs = kernels.Case(4, 2, 16, 3, 48), []
    for make in (kernels._sdpa, kernels._flashinfer):
        torch.manual_seed(1)
        outs.append(make(case, CPU)().reshape(3, 4, 16).float())
    torch.testing.assert_close(outs[1], outs[0], atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refused_without_a_gpu():
    with pytest.raises(BenchError, match="CUDA GPU with Triton"):
        kernels.measure_kernels((1,), (64,), (32,))


@pytest.mark.parametrize(
    "values, message",
    [
        (((0,), (64,), (32,)), "rows=0"),
        (((1,), (8,), (32,)), "lengths=8"),
        (((1,), (64,), (40,)), "budgets=40 must be a multiple"),
    ],
)
def test_bad_numbers(values, message):
    with pytest.raises(ValueError, match=message):
        kernels.measure_kernels(*values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_refuses_without_a_gpu(call):
    code, out, err = call(kernels.kernels, "--rows", "1,2")
    assert (code, out) == (2, "") and "CUDA GPU" in err
    code, _, err = call(kernels.kernels, "--budgets", "many")
    assert code == 2 and "budgets='many' must be an integer" in err
