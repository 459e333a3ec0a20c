"""Which code runs where, and how often the GPU is called in a step."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from longthink import kernels
from longthink.kernels.reference_step import LEARN, Turn, Used
from tests.kernels.cases import Shape, make_learn, make_pool, make_slots, new_token

LAYERS = 28


@pytest.fixture
def launches(monkeypatch):
    """Launches of the calls of the test, which go to Triton as if the tensors were on a GPU."""
    pytest.importorskip("triton")
    from tests.kernels.launches import recorded

    monkeypatch.setattr(kernels, "_goes_to_triton", lambda tensor: True)
    with recorded() as found:
        yield found


@pytest.mark.parametrize("kind", LEARN)
def test_a_step_takes_at_most_three_launches_a_layer(launches, kind):
    shape = Shape(rows=2)
    for _ in range(LAYERS):
        slots = make_slots(shape, representatives="bound" in kind)
        kernels.step_attention(*new_token(shape), slots, 0.1, make_learn(kind, slots, shape))
    table = torch.zeros(LAYERS * 2, 2, 6, dtype=torch.int32)
    row = torch.zeros(2, dtype=torch.int64)
    position = table.repeat_interleave(16, -1)
    turn = Turn(
        position, torch.zeros(LAYERS * 2, 2, dtype=torch.int64), *[row] * 3, 16, row, priority_NKP=table
    )
    kernels.bookkeep(turn, Used(table, table.float(), 0.5))
    assert len(launches) == 2 * LAYERS + 1 <= 3 * LAYERS
    assert launches[-1].grid == (LAYERS * 2 * 2,)


def test_other_calls(launches):
    shape = Shape()
    slots, pool = make_slots(shape), make_pool(shape)
    kernels.select_attention(*new_token(shape), slots, torch.tensor([3]), 0.1)
    assert len(launches) == 3
    kernels.step_attention(*new_token(shape), pool, 0.1, kernels.Learn("bound"))
    assert len(launches) == 5
    resident = (slots.position_BKS >= 0).expand(-1, shape.heads, -1)
    held = slots.keys_BKSD, slots.values_BKSD
    kernels.decode_attention(new_token(shape)[0], *held, resident, 0.1, with_weights=False)
    assert len(launches) == 7
    index = torch.zeros(1, shape.heads, 16, dtype=torch.int64)
    kernels.move_tokens(*held, slots.position_BKS, None, index, index)
    assert len(launches) == 8


def test_splits_fill_the_device_and_cover_all_tokens(launches):
    for pages in (1, 5, 64, 1000):
        shape = Shape(pages=pages)
        kernels.step_attention(*new_token(shape), make_slots(shape, representatives=False), 0.1)
        grid, arguments = launches[-2].grid, launches[-2].arguments
        names = dict(zip(launches[-2].kernel.arg_names, arguments, strict=False))
        assert (grid[1] - 1) * names["split_tokens"] < names["tokens"] <= grid[1] * names["split_tokens"]
        assert names["split_tokens"] % launches[-2].options["BLOCK_S"] == 0
    assert grid[1] > 1


def test_only_tensors_on_a_gpu_go_to_triton():
    pytest.importorskip("triton")
    assert not kernels._goes_to_triton(torch.zeros(1))
    for dtype, goes in ((torch.float32, True), (torch.bfloat16, True), (torch.float64, False)):
        assert kernels._goes_to_triton(SimpleNamespace(is_cuda=True, dtype=dtype)) == goes


def test_a_cpu_needs_no_triton():
    code = (
        "import sys, torch\nfrom longthink import kernels\n"
        "q = torch.randn(1, 1, 2, 8); kv = torch.randn(1, 1, 16, 8)\n"
        "kernels.decode_attention(q, kv, kv, torch.ones(1, 1, 16, dtype=torch.bool), 1.0, with_weights=True)\n"
        "row = torch.zeros(1, dtype=torch.int64); position = torch.full((1, 1, 16), -1, dtype=torch.int32)\n"
        "slots = kernels.Slots(kv, kv.clone(), position, row[None], row, 16)\n"
        "kernels.step_attention(q, q[:, :, 0], q[:, :, 1], slots, 1.0)\n"
        "print([name for name in sys.modules if name.startswith('longthink.kernels.triton')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
