"""The numerical work, behind one set of names.

`reference` and `reference_step` are the definition, in plain torch, and run on every device. Tensors on a GPU go to
Triton kernels of the same names, where there are some and Triton is installed: docs/kernels.md. What a compiler
shall make loops of on a CPU is in `compiled`.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from longthink.kernels import compiled, reference, reference_replay, reference_step
from longthink.kernels.reference import (
    Rule,
    block_attention,
    column_mass,
    evictable_pages,
    hash_priority,
    keeper_slots,
    logical_pages,
    lowest,
    page_mass,
    rotate_keys,
    stamp_used,
    top_fraction,
    top_pages,
)
from longthink.kernels.reference_replay import Again
from longthink.kernels.reference_step import Learn, Pool, Slots, Turn, Used, entries

__all__ = [
    "Again",
    "Learn",
    "Pool",
    "Rule",
    "Slots",
    "Turn",
    "Used",
    "block_attention",
    "bookkeep",
    "bound_scores",
    "column_mass",
    "decode_attention",
    "discriminant_scores",
    "entries",
    "evictable_pages",
    "fuses_append",
    "hash_priority",
    "keeper_slots",
    "logical_pages",
    "lowest",
    "move_tokens",
    "page_mass",
    "replay",
    "rotate_keys",
    "select_attention",
    "stamp_used",
    "step_attention",
    "top_fraction",
    "top_pages",
]


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _goes_to_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype != torch.float64 and _has_triton()


def fuses_append(tensor: Tensor) -> bool:
    """Whether `step_attention` writes and reads in one kernel where the tensor is."""
    return _goes_to_triton(tensor)


def decode_attention(
    query_BKGD: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    resident_BKS: Tensor,
    scaling: float,
    *,
    with_weights: bool,
    many: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new token per row: see `reference.decode_attention`.

    `many` says that the slots are those of a cache that grows, for which a CPU has another fastest way.
    """
    attend = reference.decode_attention
    if _goes_to_triton(query_BKGD):
        from longthink.kernels.triton_step import decode_attention as attend
    elif (
        query_BKGD.is_cpu
        and torch.compiler.is_compiling()
        and not many
        and (
            # SDPA is faster beside many rows, but for keys that it would have to widen first.
            len(query_BKGD) <= compiled.FEW_ROWS or keys_BKSD.dtype != query_BKGD.dtype
        )
    ):
        attend = compiled.decode_attention
    return attend(query_BKGD, keys_BKSD, values_BKSD, resident_BKS, scaling, with_weights=with_weights)


def bound_scores(query_BKGD: Tensor, kmin_BKPD: Tensor, kmax_BKPD: Tensor) -> Tensor:
    """Quest's upper bound of the largest q.k in each page: see `reference.bound_scores`."""
    by_sums = query_BKGD.is_cpu and torch.compiler.is_compiling()
    return (compiled if by_sums else reference).bound_scores(query_BKGD, kmin_BKPD, kmax_BKPD)


def discriminant_scores(
    features_BKSD: Tensor, marked_BKS: Tensor, resident_BKS: Tensor, ridge: float
) -> Tensor:
    """How much each token looks like the marked ones: see `reference.discriminant_scores`."""
    by_sums = features_BKSD.is_cpu and torch.compiler.is_compiling()
    score = (compiled if by_sums else reference).discriminant_scores
    return score(features_BKSD, marked_BKS, resident_BKS, ridge)


def step_attention(
    query_BKGD: Tensor,
    key_BKD: Tensor,
    value_BKD: Tensor,
    cache: Slots | Pool,
    scaling: float,
    learn: Learn | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Write the new token, read what is resident, and learn: see `reference_step.step_attention`."""
    attend = reference_step.step_attention
    if _goes_to_triton(query_BKGD):
        from longthink.kernels.triton_step import step_attention as attend
    return attend(query_BKGD, key_BKD, value_BKD, cache, scaling, learn)


def select_attention(
    query_BKGD: Tensor, key_BKD: Tensor, value_BKD: Tensor, slots: Slots, cap_B: Tensor, scaling: float
) -> Tensor:
    """Write the new token, and read the best pages: see `reference_step.select_attention`."""
    attend = reference_step.select_attention
    if _goes_to_triton(query_BKGD):
        from longthink.kernels.triton_step import select_attention as attend
    return attend(query_BKGD, key_BKD, value_BKD, slots, cap_B, scaling)


def bookkeep(turn: Turn, used: Used | None = None) -> Tensor:
    """Stamp pages and name the slot of the next one, for all layers: see `reference_step.bookkeep`."""
    work = reference_step.bookkeep
    if _goes_to_triton(turn.position_NKS):
        from longthink.kernels.triton_book import bookkeep as work
    return work(turn, used)


def move_tokens(
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    position_BKS: Tensor,
    state_BKS: Tensor | None,
    source_BKM: Tensor,
    target_BKM: Tensor,
) -> None:
    """Carry tokens to other slots: see `reference_step.move_tokens`."""
    work = reference_step.move_tokens
    if _goes_to_triton(keys_BKSD):
        from longthink.kernels.triton_book import move_tokens as work
    work(keys_BKSD, values_BKSD, position_BKS, state_BKS, source_BKM, target_BKM)


def replay(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, out_NHD: Tensor, again: Again, scaling: float
) -> None:
    """Decode tokens again, one after the other: see `reference_replay.replay`."""
    work = reference_replay.replay
    if _goes_to_triton(query_NHD):
        from longthink.kernels.triton_replay import replay as work
    work(query_NHD, key_NKD, value_NKD, out_NHD, again, scaling)
