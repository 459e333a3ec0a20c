"""Packing, from its rule alone: one group of numbers at a time, in Python floats, and bytes bit by bit."""

import math
import struct

PLANES = {8: [8], 4: [4], 3: [2, 1], 2: [2], 1: [1]}
KEYS = {8: [8, 8, 8, 8], 4: [4, 4, 4, 4], 3: [4, 4, 2, 2], 2: [4, 2, 1, 1]}
SHARE = {1: 0.6, 2: 0.85}


def half(number: float) -> float:
    """The float16 next to the float32 next to a number, NaN where there is none that is finite."""
    try:
        (single,) = struct.unpack("f", struct.pack("f", number))
        (found,) = struct.unpack("e", struct.pack("e", single))
    except OverflowError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def round_group(numbers: list[float], bits: int, share: float = 1.0) -> tuple[list[int], float, float]:
    """Codes, step and minimum of a group, spread over a share of its range."""
    most = 2**bits - 1
    if not all(map(math.isfinite, numbers)):
        return [0] * len(numbers), math.nan, math.nan
    margin = (max(numbers) - min(numbers)) * (1 - share) / 2
    low = half(min(numbers) + margin)
    step = half(max(0.0, max(numbers) - margin - low) / most)
    if math.isnan(low) or math.isnan(step):
        return [0] * len(numbers), math.nan, math.nan
    codes = [min(most, max(0, round((x - low) / step if step else x - low))) for x in numbers]
    return codes, step, low


def read_group(numbers: list[float], bits: int, share: float = 1.0) -> list[float]:
    """What a group is read as."""
    codes, step, low = round_group(numbers, bits, share)
    return [code * step + low for code in codes]


def key_bits(bits: int, order: list[int]) -> list[int]:
    """Bits of each channel of keys, of which the first in the order have most."""
    found = [0] * len(order)
    for place, channel in enumerate(order):
        found[channel] = KEYS[bits][4 * place // len(order)]
    return found


def read_keys(keys: list[list[float]], bits: int, order: list[int]) -> list[list[float]]:
    """Keys of a page (tokens x channels): a group is a channel."""
    columns = [
        read_group(list(column), own, SHARE.get(own, 1.0))
        for column, own in zip(zip(*keys, strict=True), key_bits(bits, order), strict=True)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def rotate(row: list[float]) -> list[float]:
    """The product with Hadamard matrices, of the greatest power of two that divides the length."""
    size = math.gcd(len(row), 2**20)
    return [
        sum((-1) ** (i & j).bit_count() * row[start + j] for j in range(size)) / math.sqrt(size)
        for start in range(0, len(row), size)
        for i in range(size)
    ]


def read_values(values: list[list[float]], bits: int) -> list[list[float]]:
    """Values of a page: a group is up to 64 channels of a rotated token that divide all channels evenly."""
    dim = len(values[0])
    size = math.gcd(dim, 64)
    return [
        rotate([x for at in range(0, dim, size) for x in read_group(rotate(row)[at : at + size], bits)])
        for row in values
    ]


def order_of_channels(keys: list[list[float]], queries: list[list[float]]) -> list[int]:
    """Channels by the variance of a prompt's keys times the mean square of its queries, greatest first."""
    dim = len(keys[0])

    def matters(channel: int) -> float:
        column = [key[channel] for key in keys]
        mean = sum(column) / len(column)
        return sum((x - mean) ** 2 for x in column) * sum(query[channel] ** 2 for query in queries)

    return sorted(range(dim), key=lambda channel: (-matters(channel), channel))


def codes_of(byte_rows: list[list[int]], tokens: int, bits: int) -> list[list[int]]:
    """Codes (tokens x channels) in the byte rows of a page."""
    codes = [[0] * len(byte_rows[0]) for _ in range(tokens)]
    first, below = 0, 0
    for width in PLANES[bits]:
        rows = tokens * width // 8
        for token in range(tokens):
            row = byte_rows[first + token % rows]
            for channel, byte in enumerate(row):
                codes[token][channel] += ((byte >> token // rows * width) % 2**width) << below
        first, below = first + rows, below + width
    return codes
