"""Packing, from its rule alone: one group of numbers at a time, in Python floats, and bytes bit by bit."""

import math
import struct

PLANES = {8: [8], 4: [4], 3: [2, 1], 2: [2]}


def half(number: float) -> float:
    """The float16 next to the float32 next to a number, NaN where there is none that is finite."""
    try:
        (single,) = struct.unpack("f", struct.pack("f", number))
        (found,) = struct.unpack("e", struct.pack("e", single))
    except OverflowError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def round_group(numbers: list[float], bits: int) -> tuple[list[int], float, float]:
    """Codes, step and minimum of a group."""
    most = 2**bits - 1
    if not all(map(math.isfinite, numbers)):
        return [0] * len(numbers), math.nan, math.nan
    low = half(min(numbers))
    step = half(max(0.0, max(numbers) - low) / most)
    if math.isnan(low) or math.isnan(step):
        return [0] * len(numbers), math.nan, math.nan
    codes = [min(most, max(0, round((x - low) / step if step else x - low))) for x in numbers]
    return codes, step, low


def read_group(numbers: list[float], bits: int) -> list[float]:
    """What a group is read as."""
    codes, step, low = round_group(numbers, bits)
    return [code * step + low for code in codes]


def read_keys(keys: list[list[float]], bits: int) -> list[list[float]]:
    """Keys of a page (tokens x channels): a group is a channel."""
    columns = [read_group(list(column), bits) for column in zip(*keys, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def read_values(values: list[list[float]], bits: int) -> list[list[float]]:
    """Values of a page: a group is up to 32 channels of a token that divide all channels evenly."""
    dim = len(values[0])
    size = math.gcd(dim, 32)
    return [
        [x for start in range(0, dim, size) for x in read_group(row[start : start + size], bits)]
        for row in values
    ]


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
