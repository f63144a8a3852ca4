"""How int4 weights are packed for products with 8-bit activations."""

import pytest
import torch

from qcompiler.lowering.kernels.scaled_linear.layout import half_of, pack_int4, unpack_int4


@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("width", [128, 200, 1])
def test_int4_comes_back(group, width):
    codes = torch.randint(-8, 8, (5, width), dtype=torch.int8)
    packed = pack_int4(codes, group)
    block = 2 * half_of(group)
    assert packed.shape == (5, -(-width // block) * block // 2)
    assert torch.equal(unpack_int4(packed, group, width), codes)


def test_where_codes_lie():
    codes = (torch.arange(128) * 7 % 15 - 8).to(torch.int8)[None]
    nibbles = codes.view(torch.uint8) & 15
    packed = pack_int4(codes, 128)
    assert packed[0, 3] == nibbles[0, 3] | (nibbles[0, 67] << 4)
    packed = pack_int4(codes, 32)
    assert packed[0, 3] == nibbles[0, 3] | (nibbles[0, 35] << 4)
    assert packed[0, 35] == nibbles[0, 67] | (nibbles[0, 99] << 4)
