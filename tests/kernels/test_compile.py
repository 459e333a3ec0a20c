"""The Triton kernels compile for real GPUs, which takes no GPU: the interpreter accepts more than the compiler."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("Triton interprets in this process and cannot compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from longthink.accelerators import triton_tables  # noqa: E402
from longthink.accelerators.table import FUSED  # noqa: E402
from longthink.cache.store import SlotStore  # noqa: E402
from longthink.kernels import triton_decode  # noqa: E402
from longthink.policies import Moves, make_policy  # noqa: E402
from tests.kernels.cases import Shape, changed, make_paged, make_store, name, new_token  # noqa: E402
from tests.kernels.launches import recorded  # noqa: E402

NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a program may have: A100 and H100."""

QWEN_7B = Shape(groups=7, dim=128, heads=4, pages=64, dtype=torch.bfloat16)
WIDE = Shape(groups=1, dim=256, heads=2, pages=64, dtype=torch.float16)
FULL = Shape(groups=4, dim=80, heads=2, pages=64, dtype=torch.float32)


def compile_launches(launches, capability=90):
    for launch in launches:
        names = launch.kernel.arg_names
        constants = {name: value for name, value in launch.options.items() if name in names}
        signature = {
            name: "*" + NAMES[value.dtype]
            if isinstance(value, torch.Tensor)
            else ("fp32" if isinstance(value, float) else "i32")
            for name, value in zip(names, launch.arguments, strict=False)
        } | dict.fromkeys(constants, "constexpr")
        options = {name: value for name, value in launch.options.items() if name not in names}
        made = triton.compile(
            ASTSource(launch.kernel, signature, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        assert "cubin" in made.asm
        assert made.metadata.shared <= SHARED_MEMORY[capability]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "shape", "launched"),
    [
        ("raas", QWEN_7B, 2),
        ("raas:score=exact", QWEN_7B, 2),
        ("milestone", QWEN_7B, 2),
        ("h2o", QWEN_7B._replace(pages=1024), 2),
        ("quest", QWEN_7B, 3),
        ("raas:used=alpha", WIDE, 2),
        ("raas:sharing=layer", FULL, 2),
    ],
    ids=name,
)
def test_a_step(spec, shape, launched):
    policy = make_policy(spec)
    with recorded() as launches:
        FUSED[type(policy)](policy).step(make_store(policy, shape), new_token(shape), 0.1)
    assert len(launches) == launched
    compile_launches(launches, 80 if policy.name == "h2o" else 90)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "capability"), [(QWEN_7B, 90), (WIDE, 80)], ids=name)
def test_reading(shape, capability):
    query = new_token(shape)[0].unflatten(1, (shape.heads, -1))
    store = make_store(make_policy("fifo"), shape)
    held = store.keys_BKSD, store.values_BKSD, store.table.resident_BKS
    with recorded() as launches:
        triton_decode.decode_attention(query, *held, 0.1, with_weights=True)
        triton_decode.paged_attention(query, make_paged(shape, 16), 0.1)
    assert len(launches) == 4
    compile_launches(launches, capability)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["raas", "raas:used=alpha:sharing=layer", "milestone", "h2o", "fifo"])
def test_tables_of_all_layers(spec):
    policy, layers, rows, heads, pages = make_policy(spec), 28, 3, 4, 256
    fused = FUSED[type(policy)](policy)
    whole = SlotStore(policy, torch.zeros(layers * rows, heads, 0, 1), [pages] * layers * rows, pages)
    first = changed(whole, lambda tensor: tensor[:rows])
    tables = whole, first, fused.eviction_rule(first.table, whole.table)
    stamping = fused.stamp_rule(whole.table, torch.zeros(layers * rows, heads, pages))
    with recorded() as launches:
        triton_tables.evict(*tables)
        triton_tables.evict(*tables, stamping)
    assert [launch.grid for launch in launches] == [(whole.tail_BK.numel(),)] * 2
    compile_launches(launches[: 1 if stamping is None else 2])


@pytest.mark.slow
def test_moves():
    store, index = make_store(make_policy("milestone"), QWEN_7B), torch.zeros(1, 4, 16, dtype=torch.int64)
    with recorded() as launches:
        triton_tables.move_tokens(store, Moves(index, index), store.table.state["marked"])
    assert len(launches) == 1
    compile_launches(launches)


def test_no_learning_needs_no_state():
    policy = make_policy("fifo")
    with recorded() as launches:
        FUSED[type(policy)](policy).step(make_store(policy, FULL), new_token(FULL), 0.1)
    assert launches[1].options["COMBINE"] == 0
