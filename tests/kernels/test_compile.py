"""The Triton kernels compile for real GPUs, which takes no GPU: the interpreter accepts more than the compiler."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("Triton interprets in this process and cannot compile", allow_module_level=True)

from longthink.kernels.reference_step import Learn, Rule, Turn, Used  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from longthink.kernels import Again, triton_book, triton_replay, triton_step  # noqa: E402
from tests.kernels.cases import Shape, make_learn, make_pool, make_slots, new_token  # noqa: E402
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
    "shape, kind, make",
    [
        (QWEN_7B, "bound", make_slots),
        (QWEN_7B, "mass", make_slots),
        (QWEN_7B, "marks", make_slots),
        (QWEN_7B._replace(page_size=1, pages=1024), "heavy", make_slots),
        (QWEN_7B, "mass", make_pool),
        (WIDE, "bound_share", make_pool),
        (WIDE, "weights", make_slots),
        (FULL, "bound", make_slots),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_attention(shape, kind, make):
    cache = make(shape, representatives="bound" in kind)
    with recorded() as launches:
        triton_step.step_attention(*new_token(shape), cache, 0.1, make_learn(kind, cache, shape))
    assert len(launches) == 2
    compile_launches(launches, 80 if kind == "weights" else 90)


@pytest.mark.slow
def test_selection():
    with recorded() as launches:
        triton_step.select_attention(*new_token(QWEN_7B), make_slots(QWEN_7B), torch.tensor([8]), 0.1)
    assert len(launches) == 3
    compile_launches(launches)


@pytest.mark.slow
def test_plain_attention():
    slots = make_slots(QWEN_7B)
    with recorded() as launches:
        resident = (slots.position_BKS >= 0).expand(-1, 4, -1)
        triton_step.decode_attention(
            new_token(QWEN_7B)[0], slots.keys_BKSD, slots.values_BKSD, resident, 0.1, with_weights=True
        )
    compile_launches(launches)


@pytest.mark.slow
@pytest.mark.parametrize("r", [0.5, None])
def test_bookkeeping(r):
    position = torch.zeros(28 * 3, 4, 256 * 16, dtype=torch.int32)
    stamp, score = torch.zeros(84, 4, 256, dtype=torch.int32), torch.zeros(84, 4, 256)
    row = torch.zeros(3, dtype=torch.int64)
    for priority in (None, stamp, score):
        turn = Turn(
            position, torch.zeros(84, 4, dtype=torch.int64), *[row] * 3, 16, Rule(row, row, row), priority
        )
        with recorded() as launches:
            triton_book.bookkeep(turn, Used(stamp, score, r))
        assert len(launches) == 1 and launches[0].grid == (28 * 3 * 4,)
        compile_launches(launches)


@pytest.mark.slow
@pytest.mark.parametrize("stamps", [False, True])
def test_replay(stamps):
    blocks, heads, groups, dim = 100, 4, 7, 128
    keys = torch.zeros(blocks, heads, 16, dim, dtype=torch.bfloat16).transpose(1, 2)
    ends = torch.zeros(blocks, heads, dim, dtype=torch.bfloat16)
    position, row = torch.zeros(blocks, heads, 16, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    table, new = (
        torch.zeros(3, 80, dtype=torch.int64),
        torch.zeros(50, heads * groups, dim, dtype=torch.bfloat16),
    )
    learned = (ends, ends, torch.zeros(blocks, heads, 1, dtype=torch.int32), 0.5) if stamps else ()
    again = Again(keys, keys, position, table, *[row] * 5, *learned)
    with recorded() as launches:
        triton_replay.replay(new, new[:, :heads], new[:, :heads], torch.zeros_like(new), again, 0.1)
    assert len(launches) == 1 and launches[0].grid == (3 * heads,)
    compile_launches(launches)


@pytest.mark.slow
def test_moves():
    slots = make_slots(QWEN_7B)
    state = torch.zeros(slots.position_BKS.shape, dtype=torch.int8)
    index = torch.zeros(1, 4, 16, dtype=torch.int64)
    with recorded() as launches:
        triton_book.move_tokens(slots.keys_BKSD, slots.values_BKSD, slots.position_BKS, state, index, index)
    assert len(launches) == 1
    compile_launches(launches)


def test_no_learning_needs_no_state():
    with recorded() as launches:
        triton_step.step_attention(*new_token(FULL), make_slots(FULL, representatives=False), 0.1, Learn())
    assert launches[1].options["LEARN"] == 0
