"""Which code runs where, and how often the GPU is called in a step."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longthink import accelerators, kernels
from longthink.cache import LayerCache
from longthink.config import Budget
from longthink.policies import Moves, SavesTokens, make_policy
from tests.kernels.cases import Shape, make_paged, make_store, new_token

LAYERS = 28
GROUPED = (
    "raas", "raas:used=alpha", "raas:score=exact", "raas:sharing=layer:pin_prompt=false", "milestone", "h2o",
    "h2o:pin_prompt=true", "recency", "fifo",
)  # fmt: skip


@pytest.fixture
def launches(monkeypatch):
    """Launches of the calls of the test, which go to Triton as if the tensors were on a GPU."""
    pytest.importorskip("triton")
    from tests.kernels.launches import recorded

    monkeypatch.setattr(kernels, "runs_triton", lambda tensor: True)
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


def fused_layers(spec, prompt):
    """Layers that have read a prompt, with the steps that there are on a GPU."""
    policy = make_policy(spec)
    fused = accelerators.fused_steps(torch.device("cpu"))
    layers = [LayerCache(policy, Budget(decode_budget=64), fused=fused) for _ in range(LAYERS)]
    for layer in layers:
        layer.attend(*torch.randn(3, 1, 2, prompt, 8))
    return layers


@pytest.mark.parametrize("spec", GROUPED)
@pytest.mark.parametrize("opens", [False, True])
def test_a_step_of_the_cache_takes_at_most_three_launches_a_layer(spec, opens, launches):
    layers = fused_layers(spec, 15 + opens)
    (group,) = accelerators.group_layers(layers)
    new = tuple(torch.randn(3, 1, 2, 8))
    launches.clear()
    with Operations() as torch_too:
        opened = [layer.begin_step() is not None for layer in layers]
        group.refresh()
        if opened[0]:
            group.save_tokens(group.choose_slots())
        before = len(launches) + len(torch_too.names)
        for layer in layers:
            layer.step(new, 0.1)
        of_layers = len(launches) + len(torch_too.names) - before
        group.stamp_pages()
    policy = layers[0].policy
    assert opened == [opens or policy.page_size == 1] * LAYERS
    assert of_layers == 3 * LAYERS
    if not isinstance(policy, SavesTokens):  # the discriminant of milestone is torch's
        assert len(launches) + len(torch_too.names) - of_layers <= 10


def test_selection_takes_three_launches(launches):
    layers = fused_layers("quest", 15)
    assert accelerators.group_layers(layers) == []
    launches.clear()
    layers[0].step(tuple(torch.randn(3, 1, 2, 8)), 0.1)
    assert len(launches) == 3


def test_the_tables_of_all_layers_take_one_launch(launches):
    (group,) = accelerators.group_layers(fused_layers("raas", 15))
    for call in (group.choose_slots, group.stamp_pages):
        launches.clear()
        call()
        assert len(launches) == 1 and launches[0].grid == (LAYERS * 2,)


def test_tokens_of_a_layer_are_moved_in_one_launch(launches):
    from longthink.accelerators.triton_tables import move_tokens

    store = make_store(make_policy("milestone"), Shape())
    index = torch.zeros(1, 2, 16, dtype=torch.int64)
    move_tokens(store, Moves(index, index), store.table.state["marked"])
    assert len(launches) == 1


@pytest.mark.parametrize("with_weights", [False, True])
def test_reading_takes_two_launches(launches, with_weights):
    shape = Shape()
    store, query = make_store(make_policy("fifo"), shape), new_token(shape)[0].unflatten(1, (shape.heads, -1))
    held = store.keys_BKSD, store.values_BKSD, store.table.resident_BKS
    kernels.decode_attention(query, *held, 0.1, with_weights=with_weights)
    assert len(launches) == 2
    kernels.paged_attention(query, make_paged(shape, 16), 0.1)
    assert len(launches) == 4


def test_splits_fill_the_device_and_cover_all_tokens(launches):
    for pages in (1, 5, 64, 1000):
        shape = Shape(pages=pages)
        held = make_store(make_policy("fifo"), shape)
        held = held.keys_BKSD, held.values_BKSD, held.table.resident_BKS
        query = new_token(shape)[0].unflatten(1, (shape.heads, -1))
        kernels.decode_attention(query, *held, 0.1, with_weights=False)
        grid, arguments = launches[-2].grid, launches[-2].arguments
        names = dict(zip(launches[-2].kernel.arg_names, arguments, strict=False))
        assert (grid[1] - 1) * names["split_tokens"] < names["tokens"] <= grid[1] * names["split_tokens"]
        assert names["split_tokens"] % launches[-2].options["BLOCK_S"] == 0
    assert grid[1] > 1


def test_only_tensors_on_a_gpu_go_to_triton():
    pytest.importorskip("triton")
    for runs in (kernels.runs_triton, accelerators.available):
        assert not runs(torch.zeros(1))
        for dtype, goes in ((torch.float32, True), (torch.bfloat16, True), (torch.float64, False)):
            assert runs(SimpleNamespace(is_cuda=True, dtype=dtype)) == goes


@pytest.mark.slow
def test_a_cpu_needs_no_triton():
    """All policies decode where Triton cannot be imported, and where nothing else of the fused route is."""
    code = """
import sys
sys.modules["triton"] = None
import torch
import longthink
from longthink import accelerators
from longthink.cache import LayerCache, Rotation
from longthink.policies import available_policies, make_policy, needs_budget
from longthink.config import Budget
for name in available_policies():
    policy = make_policy(name)
    fused = accelerators.fused_steps(torch.device("cpu"))
    budget = Budget(decode_budget=32) if needs_budget(policy) else None
    layer = LayerCache(policy, budget, rotation=Rotation(torch.ones(4)), fused=fused)
    for tokens in (20, 1):
        layer.attend(*torch.randn(3, 1, 2, tokens, 8))
    assert accelerators.group_layers([layer]) == []
print([name for name in sys.modules if "triton_" in name and "longthink" in name])
print([name for name in sys.modules if name.startswith("longthink.accelerators.")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]
