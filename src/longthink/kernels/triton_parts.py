"""Device functions shared by the Triton kernels: products, online softmax, top-k pages.

Shape suffixes: P page slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

MARGIN_LOG2 = tl.constexpr(1e-3)
"""Rounding margin for skipping logits that cannot exceed alpha; doubled where they are stored."""
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b):
    """Product of two tiles with float32 accumulation. Triton's interpreter cannot multiply bfloat16."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def attend_tile(top, total, out, logits, v):
    """Online softmax: update maximum, sum and output by a tile of logits (base 2) and values."""
    higher = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    shrink, weight = tl.exp2(top - safe), tl.exp2(logits - safe[:, None])
    return higher, total * shrink + tl.sum(weight, 1), out * shrink[:, None] + dot(weight.to(v.dtype), v)


@triton.jit
def group_max(x):
    """Maximum over the query heads of a group; propagates NaN, as torch does."""
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    return tl.where(broken, float("nan"), tl.max(x, 0))


@triton.jit
def rank_key(score):
    """Order-preserving map of scores to integers from 0 to 2**32 - 1; NaN is the largest, as in torch."""
    score = tl.where(score == 0, 0.0, score)  # the two zeros are a tie
    bits = tl.where(score != score, 0x7FFFFFFF, score.to(tl.int32, bitcast=True)).to(tl.int64)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits) + 0x80000000


@triton.jit
def least_of_best(key, page, count):
    """Key of the `count`-th best page, and the last page selected among those with that key.

    A bitwise binary search, without sorting or memory. Ties go to the lower page; negative keys do not count.
    """
    least = (count * 0).to(tl.int64)
    for step in range(32):
        raised = least + ((least * 0 + 1) << (31 - step))
        least = tl.where(tl.sum((key >= raised).to(tl.int32), 0) >= count, raised, least)
    room = count - tl.sum((key > least).to(tl.int32), 0)
    tied = key == least
    last = (count * 0 + 0x7FFFFFFF).to(tl.int32)
    if tl.sum(tied.to(tl.int32), 0) > room:
        last = last * 0
        for step in range(31):
            raised = last + ((last * 0 + 1) << (30 - step))
            last = tl.where(tl.sum((tied & (page < raised)).to(tl.int32), 0) < room, raised, last)
    return least, last


@triton.jit
def is_best(key, page, least, last):
    """Whether pages are among those that `least_of_best` selected."""
    return (key > least) | ((key == least) & (page <= last))
