"""Packed pages against the slow reading of their rule, for any numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longthink.config import PACKED_BITS
from longthink.kernels import compiled, packing
from tests.examples import few
from tests.oracle.packing import codes_of, read_keys, read_values, round_group
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


def same(found: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=found.dtype), rtol=1e-6, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("value_bits", PACKED_BITS)
@bits
@pytest.mark.parametrize(("tokens", "dim"), [(16, 8), (32, 64), (8, 80)])
def test_pages_read_as_the_slow_rule_says(bits, value_bits, tokens, dim):
    keys, values = pages(tokens, dim)
    packed = packing.pack(keys, values, bits, value_bits)
    read_k, read_v = packing.unpack(packed, tokens, torch.float64)
    for head, page in ((0, 0), (1, 2)):
        same(read_k[0, head, page], read_keys(keys[0, head, page].tolist(), bits))
        same(read_v[0, head, page], read_values(values[0, head, page].tolist(), value_bits))


@bits
def test_codes_lie_in_the_bytes_where_the_rule_says(bits):
    keys, values = pages()
    packed = packing.pack(keys, values, bits, bits)
    assert packed.key_codes_BKPRD.dtype == torch.uint8
    found = codes_of(packed.key_codes_BKPRD[0, 1, 2].tolist(), 16, bits)
    columns = [round_group(list(column), bits)[0] for column in zip(*keys[0, 1, 2].tolist(), strict=True)]
    assert found == [list(row) for row in zip(*columns, strict=True)]
    # All codes are used, the largest too.
    assert max(map(max, found)) == 2**bits - 1


@bits
@pytest.mark.parametrize("value_bits", PACKED_BITS)
def test_bytes_are_those_of_the_formula(bits, value_bits):
    keys, values = pages(32, 64)
    packed = packing.pack(keys, values, bits, value_bits)
    expected = (32 * 64 * bits + 32 * 64 * value_bits) // 8 + 4 * 64 + 4 * 32 * 2
    assert sum(tensor.nbytes for tensor in packed) == 6 * expected
    assert packing.page_bytes(32, 64, bits, value_bits) == expected
    empty = packing.empty_pages(keys[:, :, 0], 3, 32, bits, value_bits)
    assert [x.shape for x in empty] == [x.shape for x in packed]
    assert [x.dtype for x in empty] == [x.dtype for x in packed]
    assert all(not x.any() for x in packing.unpack(empty, 32, torch.float32))


numbers = st.one_of(
    st.floats(-100, 100),
    st.floats(-1e-6, 1e-6),
    st.sampled_from([0.0, 1.0, -3.5, 65504.0, -65504.0, 1e5, NAN, INF, -INF]),
)


@few(60)
@given(st.lists(numbers, min_size=8, max_size=8), st.booleans(), st.sampled_from(PACKED_BITS))
def test_a_group_is_off_by_half_a_step_or_all_nan(group, constant, bits):
    group = [group[0]] * 8 if constant else group
    keys = torch.zeros(1, 1, 1, 8, 2, dtype=torch.float64)
    keys[0, 0, 0, :, 0] = torch.tensor(group, dtype=torch.float64)
    packed = packing.pack(keys, keys, bits, bits)
    read = packing.unpack(packed, 8, torch.float64)[0][0, 0, 0]
    assert (read[:, 1] == 0).all()  # the other group sees nothing of it
    spread = max(group) - min(group) if all(map(math.isfinite, group)) else INF
    if spread == INF or max(abs(min(group)), spread / (2**bits - 1)) >= 65520:
        assert read[:, 0].isnan().all()
        return
    most, step = 2**bits - 1, spread / (2**bits - 1)
    # Step and minimum are rounded to 11 bits; the smallest step is 2**-24.
    allowed = step / 2 + 2**-11 * (max(map(abs, group)) + spread) + most * 2**-25
    for x, y in zip(group, read[:, 0].tolist(), strict=True):
        assert abs(x - y) <= allowed


@bits
def test_what_is_read_is_read_the_same_when_packed_again(bits):
    packed = packing.pack(*pages(), bits, bits)
    once = packing.unpack(packed, 16, torch.float64)
    for first, second in zip(
        once, packing.unpack(packing.pack(*once, bits, bits), 16, torch.float64), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=2e-3, atol=2e-3)


@bits
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("module", [packing, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("dim", [8, 64])
def test_attention_over_both_kinds_of_slots(groups, module, bits, dim):
    torch.manual_seed(1)
    query = torch.randn(1, 2, groups, dim, dtype=torch.float64)
    near = torch.randn(2, 1, 2, 16, dim, dtype=torch.float64)
    packed = packing.pack(*pages(dim=dim), bits, 5 - bits if bits < 4 else bits)
    resident = torch.rand(1, 2, 64) < 0.7
    out, weights = module.tiered_attention(query, (near[0], near[1]), packed, resident, 16, 0.4)
    far = packing.unpack(packed, 16, torch.float64)
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
