"""Packed pages against the slow reading of their rule, for any numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longthink.config import PACKED_BITS
from longthink.kernels import compiled, packing
from tests.examples import few
from tests.oracle.packing import (
    KEYS,
    SHARE,
    codes_of,
    key_bits,
    order_of_channels,
    read_keys,
    read_values,
    rotate,
    round_group,
)
from tests.unit.test_kernels import naive_attention

bits = pytest.mark.parametrize("bits", PACKED_BITS)
NAN, INF = math.nan, math.inf


def pages(tokens=16, dim=8, seed=0, dtype=torch.float64):
    """Keys and values of three pages of two heads."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, 2, 3, tokens, dim, generator=generator, dtype=dtype)
    # A channel far off zero, as models have.
    keys[..., 3] = keys[..., 3] * 0.1 + 40
    return keys, values


def orders(dim=8):
    """An order of the channels for each of two heads."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(dim, generator=generator) for _ in range(2)])[None]


def same(found: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=found.dtype), rtol=1e-6, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("value_bits", PACKED_BITS)
@bits
@pytest.mark.parametrize(("tokens", "dim"), [(16, 8), (32, 64), (8, 80)])
def test_pages_read_as_the_slow_rule_says(bits, value_bits, tokens, dim):
    (keys, values), order = pages(tokens, dim), orders(dim)
    packed = packing.pack(keys, values, bits, value_bits, order)
    read_k, read_v = packing.unpack(packed, tokens, torch.float64, order)
    for head, page in ((0, 0), (1, 2)):
        same(read_k[0, head, page], read_keys(keys[0, head, page].tolist(), bits, order[0, head].tolist()))
        same(read_v[0, head, page], read_values(values[0, head, page].tolist(), value_bits))


@bits
def test_codes_of_keys_lie_in_the_bytes_where_the_rule_says(bits):
    (keys, values), order = pages(), orders()
    packed = packing.pack(keys, values, bits, bits, order)
    assert packed.key_codes_BKPN.dtype == torch.uint8
    columns = list(zip(*keys[0, 1, 2].tolist(), strict=True))
    widths, held, first = key_bits(bits, order[0, 1].tolist()), packed.key_codes_BKPN[0, 1, 2], 0
    # Channels with as many bits lie beside each other, in their order.
    for width in sorted(set(widths), reverse=True):
        part = [channel for channel in order[0, 1].tolist() if widths[channel] == width]
        size = 16 * len(part) * width // 8
        byte_rows = held[first : first + size].unflatten(0, (-1, len(part))).tolist()
        expected = [round_group(list(columns[channel]), width, SHARE.get(width, 1.0))[0] for channel in part]
        assert codes_of(byte_rows, 16, width) == [list(row) for row in zip(*expected, strict=True)]
        # All codes are used, the largest too.
        assert max(map(max, expected)) == 2**width - 1
        first += size
    assert first == len(held)


@bits
def test_codes_of_values_lie_in_the_bytes_where_the_rule_says(bits):
    (keys, values), order = pages(), orders()
    packed = packing.pack(keys, values, bits, bits, order)
    byte_rows = packed.value_codes_BKPN[0, 1, 2].unflatten(0, (-1, 8)).tolist()
    expected = [round_group(rotate(row), bits)[0] for row in values[0, 1, 2].tolist()]
    assert codes_of(byte_rows, 16, bits) == expected


@pytest.mark.parametrize("dim", [8, 80])
def test_rotation_mixes_blocks_and_twice_is_once_back(dim):
    row = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packing.rotate(row), torch.tensor(rotate(row.tolist()), dtype=row.dtype))
    torch.testing.assert_close(packing.rotate(packing.rotate(row)), row)


def test_channels_are_ordered_by_how_far_rounding_moves_the_logits():
    generator = torch.Generator().manual_seed(2)
    keys, queries = torch.randn(2, 2, 2, 9, 8, generator=generator, dtype=torch.float64)
    keys = keys + 100 * torch.arange(8)  # far off zero alone does not matter
    real = torch.tensor([[True] * 9, [False] * 5 + [True] * 4])
    squares = queries.masked_fill(~real[:, None, :, None], 0).square().sum(2)
    keys[~real[:, None, :, None].expand_as(keys)] = torch.nan  # what padding holds does not matter
    found = packing.order_channels(keys, real, squares)
    for row in range(2):
        for head in range(2):
            block = [x[row, head, real[row]].tolist() for x in (keys, queries)]
            assert found[row, head].tolist() == order_of_channels(*block)


@bits
@pytest.mark.parametrize("value_bits", PACKED_BITS)
def test_bytes_are_those_of_the_formula(bits, value_bits):
    (keys, values), order = pages(32, 64), orders(64)
    packed = packing.pack(keys, values, bits, value_bits, order)
    expected = (32 * 64 * bits + 32 * 64 * value_bits) // 8 + 4 * 64 + 4 * 32
    assert sum(tensor.nbytes for tensor in packed) == 6 * expected
    assert packing.page_bytes(32, 64, bits, value_bits) == expected
    empty = packing.empty_pages(keys[:, :, 0], 3, 32, bits, value_bits)
    assert [x.shape for x in empty] == [x.shape for x in packed]
    assert [x.dtype for x in empty] == [x.dtype for x in packed]
    assert all(not x.any() for x in packing.unpack(empty, 32, torch.float32, order))


numbers = st.one_of(
    st.floats(-100, 100),
    st.floats(-1e-6, 1e-6),
    st.sampled_from([0.0, 1.0, -3.5, 65504.0, -65504.0, 1e5, NAN, INF, -INF]),
)


@few(60)
@given(
    st.lists(numbers, min_size=8, max_size=8),
    st.booleans(),
    st.sampled_from(PACKED_BITS),
    st.sampled_from([0, 3]),
)
def test_a_group_is_off_by_half_a_step_or_all_nan(group, constant, bits, part):
    group = [group[0]] * 8 if constant else group
    # A channel of each part, the last with the fewest bits; values are all zeros.
    keys, order = torch.zeros(1, 1, 1, 8, 4, dtype=torch.float64), torch.arange(4)[None, None]
    keys[0, 0, 0, :, part] = torch.tensor(group, dtype=torch.float64)
    packed = packing.pack(keys, torch.zeros_like(keys), bits, bits, order)
    read = packing.unpack(packed, 8, torch.float64, order)[0][0, 0, 0]
    assert (read[:, [i for i in range(4) if i != part]] == 0).all()  # the other groups see nothing of it
    read, bits = read[:, [part]], KEYS[bits][part]
    spread = max(group) - min(group) if all(map(math.isfinite, group)) else INF
    # Few codes lie within the range, and are further from its ends.
    share, most = SHARE.get(bits, 1.0), 2**bits - 1
    margin, step = spread * (1 - share) / 2, spread * share / most
    if spread == INF or max(abs(min(group) + margin), step) >= 65520:
        assert read[:, 0].isnan().all()
        return
    # Step and minimum are rounded to 11 bits; the smallest step is 2**-24.
    allowed = max(step / 2, margin) + 2**-11 * (max(map(abs, group)) + spread) + most * 2**-25
    for x, y in zip(group, read[:, 0].tolist(), strict=True):
        assert abs(x - y) <= allowed


@bits
def test_what_is_read_is_read_the_same_when_packed_again(bits):
    order = orders()
    once = packing.unpack(packing.pack(*pages(), bits, bits, order), 16, torch.float64, order)
    twice = packing.unpack(packing.pack(*once, bits, bits, order), 16, torch.float64, order)
    # Parts of keys that are narrowed become narrower each time.
    whole = [channel for channel in range(8) if key_bits(bits, order[0, 0].tolist())[channel] > 2]
    torch.testing.assert_close(once[0][:, 0][..., whole], twice[0][:, 0][..., whole], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(once[1], twice[1], rtol=2e-3, atol=2e-3)


def test_narrow_numbers_are_rotated_as_wide_ones():
    narrow = [x.bfloat16() for x in pages(32, 64)]
    errors = []
    for keys, values in (narrow, [x.double() for x in narrow]):
        packed = packing.pack(keys, values, 8, 8, orders(64))
        _, read = packing.unpack(packed, 32, torch.float64, orders(64))
        errors.append((read - values.double()).square().mean())
    assert errors[0] < 1.1 * errors[1]


@bits
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("module", [packing, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("dim", [8, 64])
def test_attention_over_both_kinds_of_slots(groups, module, bits, dim):
    torch.manual_seed(1)
    query = torch.randn(1, 2, groups, dim, dtype=torch.float64)
    near = torch.randn(2, 1, 2, 16, dim, dtype=torch.float64)
    order = orders(dim)
    packed = packing.pack(*pages(dim=dim), bits, 5 - bits if bits < 4 else bits, order)
    resident = torch.rand(1, 2, 64) < 0.7
    out, weights = module.tiered_attention(query, (near[0], near[1]), packed, order, resident, 16, 0.4)
    far = packing.unpack(packed, 16, torch.float64, order)
    for head in range(2):
        keys, values = (
            [*full[0, head].tolist(), *read[0, head].flatten(0, 1).tolist()]
            for full, read in zip(near, far, strict=True)
        )
        for g in range(groups):
            slow, slow_weights = naive_attention(
                query[0, head, g].tolist(), keys, values, resident[0, head].tolist(), 0.4
            )
            assert out[0, head, g].tolist() == pytest.approx(slow, abs=1e-9)
            assert weights[0, head, g].tolist() == pytest.approx(slow_weights, abs=1e-9)
