"""Pieces that several Triton kernels share: places of pages, and choosing the best pages.

Shape suffixes: P page slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

MARGIN_LOG2 = tl.constexpr(1e-3)
"""Slack for rounding where logits that can be no marks are left out; twice that where they are stored."""
_KEY_BITS = tl.constexpr(63)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b):
    """Product of two tiles, summed in float32. Triton's interpreter cannot multiply bfloat16 as it is."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def rank_key(score, page):
    """Return integers whose order is that of `top_pages`: by falling score, NaN first, then by rising page.

    32 bits of score above 31 bits of page; never negative. No two pages have the same.
    """
    score = tl.where(score == 0, 0.0, score)  # the two zeros are a tie
    bits = tl.where(score != score, 0x7FFFFFFF, score.to(tl.int32, bitcast=True)).to(tl.int64)
    rising = tl.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)
    return ((rising + 0x80000000) << 31) | (0x7FFFFFFF - page.to(tl.int64))


@triton.jit
def least_of_best(key, count):
    """Return the `count`-th largest of the keys, of which negative ones do not count; found bit by bit."""
    best = (count * 0).to(tl.int64)
    for step in range(_KEY_BITS):
        raised = best + ((best * 0 + 1) << (_KEY_BITS - 1 - step))
        best = tl.where(tl.sum((key >= raised).to(tl.int32), 0) >= count, raised, best)
    return best
