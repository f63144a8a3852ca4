"""4-bit floats and their scales, every one of them, against plain Python and against ml_dtypes."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from qcompiler.numerics import fp4

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
HALFWAY = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
ALL_BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)


def naive_code(value: float) -> int:
    """The nearest number of the grid; of two equally near, the one with the even code."""
    size = abs(value)
    code = min(range(8), key=lambda c: (abs(GRID[c] - size), c % 2))
    return code | (8 if math.copysign(1, value) < 0 else 0)


def test_every_code():
    codes = torch.arange(16, dtype=torch.uint8)
    values = fp4.decode(codes)
    assert values.dtype == torch.float32
    assert values.tolist() == [*GRID, *(-value for value in GRID)]
    assert values.signbit().tolist() == [False] * 8 + [True] * 8  # code 8 is minus zero
    assert torch.equal(fp4.encode(values), codes)
    assert torch.equal(fp4.round_to_grid(values), values)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("code", "border"), list(enumerate(HALFWAY)))
def test_every_border(code, border, sign):
    at = torch.tensor([border])
    below, above = torch.nextafter(at, torch.tensor(0.0)), torch.nextafter(at, torch.tensor(9.0))
    found = fp4.encode(sign * torch.cat([below, at, above])) & 7
    assert found.tolist() == [code, code + code % 2, code + 1]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_lies_beyond_the_grid_goes_to_its_end(sign):
    values = sign * torch.tensor([6.0, 6.5, 7.0, 8.0, 1e30, torch.inf])
    assert fp4.round_to_grid(values).tolist() == [sign * 6.0] * 6


def test_equals_other_casts():
    values = torch.cat([torch.linspace(-8, 8, 4097), torch.randn(4096) * 3, torch.randn(512) * 1e-3])
    codes = fp4.encode(values)
    assert codes.tolist() == [naive_code(value) for value in values.tolist()]
    other = values.numpy().astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(codes.numpy(), other.view(np.uint8))
    assert torch.equal(fp4.decode(codes), torch.from_numpy(other.astype(np.float32)))


def test_every_e8m0_scale():
    found = fp4.decode_scale(ALL_BYTES, None)
    assert found[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert found[255].isnan()
    assert np.array_equal(found.numpy(), ALL_BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32), True)


@pytest.mark.parametrize("factor", [None, 0.37])
def test_every_e4m3_scale(factor):
    stored = ALL_BYTES.view(torch.float8_e4m3fn)
    number = None if factor is None else torch.tensor(factor)
    found = fp4.decode_scale(stored, number)
    expected = torch.from_numpy(ALL_BYTES.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert torch.equal(torch.nan_to_num(found), torch.nan_to_num(expected * (1 if number is None else number)))
    assert found.isnan().nonzero()[:, 0].tolist() == [0x7F, 0xFF]
    assert torch.equal(torch.nan_to_num(fp4.decode_scale(stored.float(), number)), torch.nan_to_num(found))


def naive_exponent(largest: float, floor: bool) -> int:
    """By comparison with powers of two; no logarithm that could be off in the last bit."""
    exponent = -127
    if floor:  # floor(log2(largest)) - 2
        while exponent < 127 and 2.0 ** (exponent + 3) <= largest:
            exponent += 1
    else:  # the least at which nothing is clamped
        while exponent < 127 and 6 * 2.0**exponent < largest:
            exponent += 1
    return exponent


@pytest.mark.parametrize("floor", [False, True])
def test_exponents(floor):
    edges = torch.tensor([m * 2.0**e for e in range(-120, 125, 7) for m in (1.0, 1.5, 1.75)])
    wider = [torch.nextafter(edges, torch.tensor(end)) for end in (0.0, torch.inf)]
    largest = torch.cat([edges, *wider, torch.tensor([2.0**-140, 3.0e38])])
    found = fp4.block_scale(largest, None, floor=floor)
    assert (found.int() - 127).tolist() == [naive_exponent(value, floor) for value in largest.tolist()]
    scale = fp4.decode_scale(found, None)
    ratio = (largest.double() / scale)[largest > 2.0**-120]
    assert bool(((ratio < 8) & (ratio >= 4)).all() if floor else ((ratio <= 6) & (ratio > 3)).all())


@pytest.mark.parametrize("floor", [False, True])
def test_every_e8m0_byte_is_reached(floor):
    scales = fp4.decode_scale(ALL_BYTES[1:252], None)
    assert torch.equal(fp4.block_scale(4 * scales, None, floor=floor), ALL_BYTES[1:252])


def test_e4m3_scales_are_rounded_and_never_zero():
    factor = torch.tensor(0.125)
    wanted = torch.tensor([448.0, 500.0, 17.0, 19.0, 2.0**-9, 2.0**-12, 0.0])
    found = fp4.block_scale(wanted * 6 * factor, factor)
    assert found.dtype == torch.float8_e4m3fn
    assert found.float().tolist() == [448.0, 448.0, 16.0, 20.0, 2.0**-9, 2.0**-9, 2.0**-9]


def test_the_block_with_the_largest_magnitude_has_the_largest_scale():
    for largest in (torch.rand(500) * 10 + 1e-3).unbind():
        factor = fp4.tensor_factor(largest)
        assert factor == largest / 2688
        assert fp4.block_scale(largest[None], factor).float().item() == 448


def test_zeros_have_scales():
    assert fp4.tensor_factor(torch.tensor(0.0)) == 1
    assert fp4.block_scale(torch.zeros(2), None).tolist() == [127, 127]
    assert fp4.tensor_factor(torch.tensor(1e-44)) > 0


@pytest.mark.parametrize(
    ("stored", "most"), [(ALL_BYTES[1:127].view(torch.float8_e4m3fn), 126), (ALL_BYTES[:255], 254)], ids=["nv", "mx"]
)
def test_neighbours(stored: Tensor, most: int) -> None:
    scale = fp4.decode_scale(stored, None)
    assert torch.equal(fp4.decode_scale(fp4.neighbour(stored, 1), None)[:-1], scale[1:])
    assert torch.equal(fp4.decode_scale(fp4.neighbour(stored, -1), None)[1:], scale[:-1])
    for steps in (-300, 300):
        ends = fp4.decode_scale(fp4.neighbour(stored, steps), None)
        assert torch.equal(ends, scale[0 if steps < 0 else -1].expand(len(scale)))
    assert int(stored.view(torch.uint8)[-1]) == most
