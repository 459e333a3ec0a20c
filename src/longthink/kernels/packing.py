"""Keys and values at few bits: whole pages packed into bytes, and the attention that reads them.

Asymmetric and uniform: a group of numbers is stored as codes from 0 to ``2**bits - 1``, with a step and a minimum in
16 bits. A group of keys is one channel over the tokens of a page, because some channels of keys are far off zero for
all tokens; a group of values is up to 32 neighbouring channels of one token (KIVI, arXiv 2402.02750, section 3).

Codes lie in bytes as planes: those of 3 bits as a plane of 2 bits and a plane of 1, the others as one. In a plane of
w bits and R byte rows, byte row r holds the codes of the tokens r, r + R, r + 2R, ..., from the lowest bits up: all
channels of a row shift by the same number, which the compiler turns into vector instructions.

Shape suffixes: B batch rows, K KV heads, G query heads per KV head, P packed page slots, T tokens in a page, R byte
rows of a page (T * bits / 8) or of a plane, J codes in a byte of a plane, D head dim, C groups of channels, X
channels of a group, S token slots, N tokens of the packed slots (P * T).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from longthink.kernels.reference import masked_softmax, wide_dtype

VALUE_GROUP = 32
"""Most channels of a value that share a step and a minimum."""
_PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}


class PackedPages(NamedTuple):
    """Pages at few bits: codes, and the step and minimum of each group, in float16.

    Attributes
    ----------
    key_codes_BKPRD, value_codes_BKPRD
        Codes, uint8; R differs where keys and values have different bits.
    key_scales_BKP2D
        Step and minimum of each channel of a page.
    value_scales_BKP2TC
        Step and minimum of each group of channels of a token.
    """

    key_codes_BKPRD: Tensor
    key_scales_BKP2D: Tensor
    value_codes_BKPRD: Tensor
    value_scales_BKP2TC: Tensor


def value_groups(head_dim: int) -> int:
    """Groups of channels of a value: of 32 channels, or as many below as divide the head dim evenly."""
    return head_dim // gcd(head_dim, VALUE_GROUP)


def page_bytes(page_size: int, head_dim: int, key_bits: int, value_bits: int) -> int:
    """Bytes of a packed page of one KV head, steps and minima included."""
    codes = page_size * head_dim * (key_bits + value_bits) // 8
    return codes + 4 * head_dim + 4 * page_size * value_groups(head_dim)


def empty_pages(like_BKSD: Tensor, pages: int, page_size: int, key_bits: int, value_bits: int) -> PackedPages:
    """Packed page slots without contents, which unpack to zeros."""
    rows, kv_heads, _, head_dim = like_BKSD.shape

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(rows, kv_heads, pages, *shape, dtype=dtype, device=like_BKSD.device)

    return PackedPages(
        zeros(page_size * key_bits // 8, head_dim, dtype=torch.uint8),
        zeros(2, head_dim, dtype=torch.float16),
        zeros(page_size * value_bits // 8, head_dim, dtype=torch.uint8),
        zeros(2, page_size, value_groups(head_dim), dtype=torch.float16),
    )


def pack(keys_BKPTD: Tensor, values_BKPTD: Tensor, key_bits: int, value_bits: int) -> PackedPages:
    """Round whole pages to few bits.

    A number is off by half a step at most, beside the rounding of step and minimum to 16 bits. All of a group becomes
    NaN where it holds a number that is not finite, or too large for 16 bits: it shows, and stays in its group.
    """
    groups = value_groups(values_BKPTD.shape[-1])
    key_codes, key_scales = _round_groups(keys_BKPTD, -2, key_bits)
    value_codes, value_scales = _round_groups(values_BKPTD.unflatten(-1, (groups, -1)), -1, value_bits)
    return PackedPages(
        _to_bytes(key_codes, key_bits),
        torch.cat(key_scales, -2),
        _to_bytes(value_codes.flatten(-2), value_bits),
        torch.stack([scale[..., 0] for scale in value_scales], -3),
    )


def unpack(pages: PackedPages, page_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of packed pages, BKPTD."""
    wide = wide_dtype(dtype)
    key_step, key_low = pages.key_scales_BKP2D.to(wide).split(1, -2)
    keys = _codes(pages.key_codes_BKPRD, page_size).to(wide) * key_step + key_low
    step_BKPTC1, low_BKPTC1 = (scale[..., None] for scale in pages.value_scales_BKP2TC.to(wide).unbind(-3))
    codes_BKPTD = _codes(pages.value_codes_BKPRD, page_size).to(wide)
    codes_BKPTCX = codes_BKPTD.unflatten(-1, (step_BKPTC1.shape[-2], -1))
    values = (codes_BKPTCX * step_BKPTC1 + low_BKPTC1).flatten(-2)
    return keys.to(dtype), values.to(dtype)


def _round_groups(x: Tensor, dim: int, bits: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Codes of the groups along a dimension, uint8, and their step and minimum, float16."""
    x = x.to(wide_dtype(x.dtype))
    most = (1 << bits) - 1
    low = x.amin(dim, keepdim=True).to(torch.float16)
    # From the minimum as it is stored, so that its rounding does not add to that of the codes.
    step = ((x.amax(dim, keepdim=True) - low).clamp(min=0) / most).to(torch.float16)
    finite = low.isfinite() & step.isfinite()
    low, step = (scale.masked_fill(~finite, torch.nan) for scale in (low, step))
    divisor = torch.where(step > 0, step, 1).to(x.dtype)
    codes = ((x - low) / divisor).nan_to_num(nan=0.0).round().clamp(0, most)
    return codes.to(torch.uint8), (step, low)


def _to_bytes(codes_BKPTD: Tensor, bits: int) -> Tensor:
    """Codes in planes of bytes, BKPRD."""
    rows, below = [], 0
    for width in _PLANES[bits]:
        plane = (codes_BKPTD >> below) & ((1 << width) - 1)
        parts = plane.unflatten(-2, (8 // width, -1)).unbind(-3)
        row = parts[0]
        for i, part in enumerate(parts[1:], 1):
            row = row | (part << (i * width))
        rows.append(row)
        below += width
    return torch.cat(rows, -2)


def _codes(bytes_BKPRD: Tensor, page_size: int) -> Tensor:
    """The codes in planes of bytes, uint8, BKPTD: the inverse of `_to_bytes`."""
    codes = None
    for below, part_BKPJRD in planes(bytes_BKPRD, page_size):
        part = part_BKPJRD.flatten(-3, -2) << below
        codes = part if codes is None else codes | part
    assert codes is not None
    return codes


def planes(bytes_BKPRD: Tensor, page_size: int) -> Iterator[tuple[int, Tensor]]:
    """What each plane holds of the codes, uint8, BKPJRD with J * R tokens, and how many bits lie below it."""
    below, start = 0, 0
    for width in _PLANES[bytes_BKPRD.shape[-2] * 8 // page_size]:
        rows = page_size * width // 8
        plane = bytes_BKPRD[..., None, start : start + rows, :]
        shift_J11 = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)[:, None, None]
        yield below, (plane >> shift_J11) & ((1 << width) - 1)
        below, start = below + width, start + rows


def tiered_attention(
    query_BKGD: Tensor,
    full: tuple[Tensor, Tensor],
    packed: PackedPages,
    resident_BKS: Tensor,
    page_size: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention of one new token per row over slots in full (keys and values, BKSD) and packed pages behind them.

    Returns the output BKGD, and the softmax weights over all token slots, BKGS (float32 or wider).
    """
    dtype = query_BKGD.dtype
    keys_BKND, values_BKND = (x.flatten(2, 3) for x in unpack(packed, page_size, dtype))
    keys_BKSD, values_BKSD = (x.to(dtype) for x in full)
    logits = [query_BKGD @ keys.transpose(-1, -2) for keys in (keys_BKSD, keys_BKND)]
    logits_BKGS = torch.cat(logits, -1).to(wide_dtype(dtype)) * scaling
    weights_BKGS = masked_softmax(logits_BKGS, resident_BKS[:, :, None])
    near, far = weights_BKGS.to(dtype).split([keys_BKSD.shape[2], keys_BKND.shape[2]], -1)
    return near @ values_BKSD + far @ values_BKND, weights_BKGS
