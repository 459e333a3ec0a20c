"""Keys and values at few bits: whole pages packed into bytes, and the attention that reads them.

Asymmetric and uniform: a group of numbers is stored as codes from 0 to ``2**bits - 1``, with a step and a minimum in
16 bits. A group of keys is one channel over the tokens of a page, because some channels of keys are far off zero for
all tokens (KIVI, arXiv 2402.02750, section 3). The bits of keys are a mean: channels come in an order, that which
matters most first, and the first parts of them have more bits than the last (`KEY_PARTS`).

Values are rotated before they are rounded, by a Hadamard matrix, so that no channel has all of the range (QuaRot,
arXiv 2404.00456, section 4); a group of them is up to 64 neighbouring channels of one token. Their weighted sum is
rotated back.

Codes lie in bytes as planes: those of 3 bits as a plane of 2 bits and a plane of 1, the others as one. In a plane of
w bits and R byte rows, byte row r holds the codes of the tokens r, r + R, r + 2R, ..., from the lowest bits up: all
channels of a row shift by the same number, which the compiler turns into vector instructions.

Shape suffixes: B batch rows, K KV heads, G query heads per KV head, P packed page slots, T tokens in a page, N bytes
of a page, R byte rows of a plane, J codes in a byte of a plane, D head dim, C groups of channels, X channels of a
group, S token slots, Q columns of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from longthink.kernels.reference import masked_softmax, wide_dtype

VALUE_GROUP = 64
"""Most channels of a value that share a step and a minimum."""
KEY_PARTS = {8: ((4, 8),), 4: ((4, 4),), 3: ((2, 4), (2, 2)), 2: ((1, 4), (1, 2), (2, 1))}
"""For each mean number of bits: quarters of the channels of keys, in their order, and their bits, a single plane."""
_NARROWER = {1: 0.6, 2: 0.85}
"""Share of the range of keys that few codes are spread over: nearer to most numbers, and further from the ends."""
_PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}


class PackedPages(NamedTuple):
    """Pages at few bits: codes, and the step and minimum of each group, in float16.

    Attributes
    ----------
    key_codes_BKPN, value_codes_BKPN
        Codes, uint8, those of keys with their channels in order.
    key_scales_BKP2D
        Step and minimum of each channel of a page, in order.
    value_scales_BKP2TC
        Step and minimum of each group of channels of a token.
    """

    key_codes_BKPN: Tensor
    key_scales_BKP2D: Tensor
    value_codes_BKPN: Tensor
    value_scales_BKP2TC: Tensor


class Part(NamedTuple):
    """Neighbouring channels with as many bits."""

    channels: slice
    bits: int


def key_parts(bits: int, head_dim: int) -> list[Part]:
    """The parts of keys whose channels have `bits` bits on average."""
    parts, start = [], 0
    for quarters, width in KEY_PARTS[bits]:
        end = start + quarters
        parts.append(Part(slice(head_dim * start // 4, head_dim * end // 4), width))
        start = end
    return parts


def value_parts(bits: int, head_dim: int) -> list[Part]:
    """The one part of rotated values."""
    return [Part(slice(0, head_dim), bits)]


def value_groups(head_dim: int) -> int:
    """Groups of channels of a value: of 64 channels, or as many below as divide the head dim evenly."""
    return head_dim // gcd(head_dim, VALUE_GROUP)


def code_bytes(parts: list[Part], page_size: int) -> int:
    """Bytes of the codes of a page."""
    return sum((part.channels.stop - part.channels.start) * part.bits for part in parts) * page_size // 8


def page_bytes(page_size: int, head_dim: int, key_bits: int, value_bits: int) -> int:
    """Bytes of a packed page of one KV head, steps and minima included."""
    parts = key_parts(key_bits, head_dim) + value_parts(value_bits, head_dim)
    return code_bytes(parts, page_size) + 4 * head_dim + 4 * page_size * value_groups(head_dim)


def order_bytes(head_dim: int) -> int:
    """Bytes of the order of the channels of one KV head, which is kept in 16 bits a channel."""
    return 2 * head_dim


def empty_pages(like_BKSD: Tensor, pages: int, page_size: int, key_bits: int, value_bits: int) -> PackedPages:
    """Packed page slots without contents, which unpack to zeros."""
    rows, kv_heads, _, head_dim = like_BKSD.shape

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(rows, kv_heads, pages, *shape, dtype=dtype, device=like_BKSD.device)

    return PackedPages(
        zeros(code_bytes(key_parts(key_bits, head_dim), page_size), dtype=torch.uint8),
        zeros(2, head_dim, dtype=torch.float16),
        zeros(code_bytes(value_parts(value_bits, head_dim), page_size), dtype=torch.uint8),
        zeros(2, page_size, value_groups(head_dim), dtype=torch.float16),
    )


def order_channels(key_BKQD: Tensor, real_BQ: Tensor, query_squares_BKD: Tensor) -> Tensor:
    """Channels of keys, BKD, from that whose rounding moves the logits most, as far as a prompt tells.

    Rounding moves a logit by query times error, and the error is a share of the range of the channel's keys: so they
    are ordered by the variance of the keys times the mean square of the queries.
    """
    real_B1Q1 = real_BQ[:, None, :, None]
    keys = key_BKQD.to(wide_dtype(key_BKQD.dtype)).masked_fill(~real_B1Q1, 0)
    count_B111 = real_B1Q1.sum(2, keepdim=True).clamp(min=1)
    deviation = (keys - keys.sum(2, keepdim=True) / count_B111).masked_fill(~real_B1Q1, 0)
    return (deviation.square().sum(2) * query_squares_BKD).argsort(dim=-1, descending=True, stable=True)


def pack(
    keys_BKPTD: Tensor, values_BKPTD: Tensor, key_bits: int, value_bits: int, order_BKD: Tensor
) -> PackedPages:
    """Round whole pages to few bits.

    A number with 3 bits or more is off by half a step at most, beside the rounding of step and minimum to 16 bits.
    All of a group becomes NaN where it holds a number that is not finite, or too large for 16 bits: it shows, and
    stays in its group (with values: in its token).
    """
    head_dim = keys_BKPTD.shape[-1]
    keys = keys_BKPTD.gather(-1, order_BKD[:, :, None, None].expand_as(keys_BKPTD))
    parts = key_parts(key_bits, head_dim)
    rounded = [
        _round_groups(keys[..., part.channels], -2, part.bits, _NARROWER.get(part.bits, 1.0))
        for part in parts
    ]
    groups = value_groups(head_dim)
    rotated = rotate(values_BKPTD.to(wide_dtype(values_BKPTD.dtype)))
    value_codes, value_scales = _round_groups(rotated.unflatten(-1, (groups, -1)), -1, value_bits)
    return PackedPages(
        torch.cat([_to_bytes(codes, part.bits) for (codes, _), part in zip(rounded, parts, strict=True)], -1),
        torch.cat([torch.cat(scales, -2) for _, scales in rounded], -1),
        _to_bytes(value_codes.flatten(-2), value_bits),
        torch.stack([scale[..., 0] for scale in value_scales], -3),
    )


def unpack(
    pages: PackedPages, page_size: int, dtype: torch.dtype, order_BKD: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of packed pages, BKPTD."""
    keys, rotated = _read(pages, page_size, wide_dtype(dtype))
    place_BKPTD = order_BKD.argsort(-1)[:, :, None, None].expand_as(keys)
    return keys.gather(-1, place_BKPTD).to(dtype), rotate(rotated).to(dtype)


def rotate(values: Tensor) -> Tensor:
    """Multiply by a symmetric Hadamard matrix, so that twice is once back: in blocks of a power of two."""
    block = values.shape[-1] & -values.shape[-1]
    width = 1
    while width < block:
        first, second = values.unflatten(-1, (-1, 2, width)).unbind(-2)
        values = torch.stack([first + second, first - second], -2).flatten(-3)
        width *= 2
    return values * block**-0.5


def _round_groups(x: Tensor, dim: int, bits: int, share: float = 1.0) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Codes of the groups along a dimension, uint8, over a share of their range; their step and minimum, float16."""
    x = x.to(wide_dtype(x.dtype))
    most = (1 << bits) - 1
    least, greatest = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    margin = (greatest - least) * ((1 - share) / 2)
    low = (least + margin).to(torch.float16)
    # From the minimum as it is stored, so that its rounding does not add to that of the codes.
    step = ((greatest - margin - low).clamp(min=0) / most).to(torch.float16)
    finite = low.isfinite() & step.isfinite()
    low, step = (scale.masked_fill(~finite, torch.nan) for scale in (low, step))
    divisor = torch.where(step > 0, step, 1).to(x.dtype)
    codes = ((x - low) / divisor).nan_to_num(nan=0.0).round().clamp(0, most)
    return codes.to(torch.uint8), (step, low)


def _to_bytes(codes_BKPTD: Tensor, bits: int) -> Tensor:
    """Codes of a part in planes of bytes, BKPN."""
    rows, below = [], 0
    for width in _PLANES[bits]:
        plane = (codes_BKPTD >> below) & ((1 << width) - 1)
        parts = plane.unflatten(-2, (8 // width, -1)).unbind(-3)
        row = parts[0]
        for i, part in enumerate(parts[1:], 1):
            row = row | (part << (i * width))
        rows.append(row.flatten(-2))
        below += width
    return torch.cat(rows, -1)


def planes(bytes_BKPN: Tensor, page_size: int, parts: list[Part]) -> Iterator[tuple[slice, int, Tensor]]:
    """Each plane of codes: its channels, how many bits lie below, and what it holds, uint8, BKPJRD (J * R tokens)."""
    start = 0
    for channels, bits in parts:
        below, count = 0, channels.stop - channels.start
        for width in _PLANES[bits]:
            rows = page_size * width // 8
            end = start + rows * count
            plane = bytes_BKPN[..., start:end].unflatten(-1, (1, rows, count))
            shift_J11 = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)[:, None, None]
            yield channels, below, (plane >> shift_J11) & ((1 << width) - 1)
            below, start = below + width, end


def layouts(pages: PackedPages, page_size: int) -> tuple[list[Part], list[Part]]:
    """Parts of keys and of values, from how many bytes there are."""
    head_dim = pages.key_scales_BKP2D.shape[-1]
    key_bits, value_bits = (
        round(8 * codes.shape[-1] / (page_size * head_dim))
        for codes in (pages.key_codes_BKPN, pages.value_codes_BKPN)
    )
    return key_parts(key_bits, head_dim), value_parts(value_bits, head_dim)


def _codes(bytes_BKPN: Tensor, page_size: int, parts: list[Part]) -> Tensor:
    """The codes in planes of bytes, uint8, BKPTD: the inverse of `_to_bytes`."""
    found: dict[int, Tensor] = {}
    for channels, below, plane_BKPJRD in planes(bytes_BKPN, page_size, parts):
        codes, first = plane_BKPJRD.flatten(-3, -2) << below, channels.start
        found[first] = found[first] | codes if first in found else codes
    return torch.cat(list(found.values()), -1)


def _read(pages: PackedPages, page_size: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys with their channels in order, and rotated values, BKPTD."""
    key_layout, value_layout = layouts(pages, page_size)
    key_step, key_low = pages.key_scales_BKP2D.to(wide).split(1, -2)
    keys = _codes(pages.key_codes_BKPN, page_size, key_layout).to(wide) * key_step + key_low
    step_BKPTC1, low_BKPTC1 = (scale[..., None] for scale in pages.value_scales_BKP2TC.to(wide).unbind(-3))
    codes_BKPTD = _codes(pages.value_codes_BKPN, page_size, value_layout).to(wide)
    codes_BKPTCX = codes_BKPTD.unflatten(-1, (step_BKPTC1.shape[-2], -1))
    return keys, (codes_BKPTCX * step_BKPTC1 + low_BKPTC1).flatten(-2)


def tiered_attention(
    query_BKGD: Tensor,
    full: tuple[Tensor, Tensor],
    packed: PackedPages,
    order_BKD: Tensor,
    resident_BKS: Tensor,
    page_size: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention of one new token per row over slots in full (keys and values, BKSD) and packed pages behind them.

    Returns the output BKGD, and the softmax weights over all token slots, BKGS (float32 or wider).
    """
    dtype, wide = query_BKGD.dtype, wide_dtype(query_BKGD.dtype)
    packed_keys, rotated = (x.flatten(2, 3).to(dtype) for x in _read(packed, page_size, wide))
    keys_BKSD, values_BKSD = (x.to(dtype) for x in full)
    far_query = query_BKGD.gather(-1, order_BKD[:, :, None].expand_as(query_BKGD))
    logits = [query_BKGD @ keys_BKSD.transpose(-1, -2), far_query @ packed_keys.transpose(-1, -2)]
    logits_BKGS = torch.cat(logits, -1).to(wide) * scaling
    weights_BKGS = masked_softmax(logits_BKGS, resident_BKS[:, :, None])
    near, far = weights_BKGS.to(dtype).split([keys_BKSD.shape[2], packed_keys.shape[2]], -1)
    return near @ values_BKSD + rotate((far @ rotated).to(wide)).to(dtype), weights_BKGS
