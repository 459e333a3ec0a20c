"""The kernels on a GPU, in the very cases in which `tests/kernels` runs them in Triton's interpreter.

What the general route reads, it reads by a kernel as well on a GPU; that one is compared with plain torch.
"""

import functools
import os

import pytest
import torch

pytest.importorskip("triton")

from longthink.accelerators import attention
from longthink.kernels import triton_decode

# Tests are collected where they are imported.
from tests.kernels.interpreted_attention import (  # noqa: F401
    scores,
    test_a_cache_narrower_than_the_model,
    test_a_query_head_with_broken_numbers_leaves_the_others_of_its_group,
    test_a_step,
    test_blocks_are_read,
    test_broken_numbers_stay_in_their_row,
    test_keys_of_minus_infinity_weigh_nothing,
    test_marks_at_any_threshold,
    test_selection_with_equal_bounds,
    test_slots_are_read,
)

try:
    from tests.kernels.interpreted_tables import (  # noqa: F401
        test_a_share_of_the_pages_counts_as_the_decimal_fraction,
        test_moves,
        test_tables,
    )
except ModuleNotFoundError as error:
    # A bare machine may lack it; what these test, whole models test as well.
    assert error.name == "hypothesis"

pytestmark = pytest.mark.gpu


def broken_floats(like, shape):
    """Memory that no program has written: if one reads it, it shows."""
    return torch.full(shape, float("nan"), dtype=torch.float32, device=like.device)


@pytest.fixture(autouse=True, scope="module")
def everything_on_the_gpu():
    """Make tensors, and the random numbers in them, on the GPU: the cases say nothing of a device."""
    if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip(
            "kernels run on a CUDA GPU, and there is none here (tests/kernels has Triton's interpreter)"
        )
    place = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.MonkeyPatch.context() as patch, torch.device(place):
        patch.setattr(torch, "Generator", functools.partial(torch.Generator, place))
        for module in (triton_decode, attention):
            patch.setattr(module, "floats", broken_floats)
        yield
