"""Which code runs where, and how often the GPU is called in a step."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from longthink.kernels.reference_step import LEARN, Turn, Used
from torch.utils._python_dispatch import TorchDispatchMode

import longthink
from longthink import kernels
from longthink.cache import LayerCache, group_books
from longthink.cache.step import save_tokens
from longthink.kernels import Rule
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


class Operations(TorchDispatchMode):
    """Counts what torch itself would launch: all but views, and memory that nobody writes."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func.__name__.startswith(("empty", "new_empty")):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "spec",
    [
        "raas",
        "raas:used=alpha",
        "raas:score=exact",
        "raas:sharing=layer",
        "milestone",
        "h2o",
        "recency",
        "fifo",
    ],
)
@pytest.mark.parametrize("opens", [False, True])
def test_a_step_of_the_cache_takes_at_most_three_launches_a_layer(spec, opens, launches):
    policy = longthink.make_policy(spec)
    layers = [LayerCache(policy, policy.make_budget(decode_budget=64)) for _ in range(LAYERS)]
    for layer in layers:
        layer.attend(*torch.randn(3, 1, 2, 15 + opens, 8))
    (books,) = group_books(layers)
    new = torch.randn(3, 1, 2, 8)
    launches.clear()
    with Operations() as torch_too:
        opened = [layer.begin_step() is not None for layer in layers]
        books.refresh()
        if opened[0]:
            for layer, full_BK in zip(layers, books.name_slots(), strict=False):
                save_tokens(policy, layer.store, full_BK)
        before = len(launches) + len(torch_too.names)
        for layer, score in zip(layers, books.scores, strict=True):
            layer.step(tuple(new), 0.1, score)
        of_layers = len(launches) + len(torch_too.names) - before
        books.stamp()
    assert opened == [opens or policy.page_size == 1] * LAYERS
    assert of_layers == 3 * LAYERS
    if policy.name != "milestone":  # whose discriminant is torch's
        assert len(launches) + len(torch_too.names) - of_layers <= 10


@pytest.mark.parametrize("kind", LEARN)
def test_attention_and_what_is_learned_take_two_launches(launches, kind):
    shape = Shape(rows=2)
    slots = make_slots(shape, representatives="bound" in kind)
    kernels.step_attention(*new_token(shape), slots, 0.1, make_learn(kind, slots, shape))
    assert len(launches) == 2


def test_the_books_of_all_layers_take_one_launch(launches):
    table = torch.zeros(LAYERS * 2, 2, 6, dtype=torch.int32)
    row = torch.zeros(2, dtype=torch.int64)
    position = table.repeat_interleave(16, -1)
    tail = torch.zeros(LAYERS * 2, 2, dtype=torch.int64)
    kernels.bookkeep(
        Turn(position, tail, *[row] * 3, 16, Rule(row), priority_NKP=table), Used(table, table.float(), 0.5)
    )
    assert len(launches) == 1 and launches[0].grid == (LAYERS * 2 * 2,)


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
