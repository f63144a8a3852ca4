"""How codebook weights are stored: there and back, by hand, and what is refused."""

import pytest
import torch

from qcompiler.errors import InputError
from qcompiler.lowering.kernels.codebook_linear import layout as module


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (16, 256), (37, 300), (5, 1000)])
def test_codes_and_tables_come_back_from_their_layout(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    packed = module.pack_codes(codes, bits)
    assert packed.shape == (-(-shape[0] // 16), -(-shape[1] // 256), bits, 16, 32)
    assert packed.is_contiguous()
    assert torch.equal(module.unpack_codes(packed, *shape), codes)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        table = torch.randn(shape[0], 1 << bits).to(dtype)
        planes = module.pack_table(table)
        assert planes.shape == ((1 << bits) // 4 * dtype.itemsize, packed.shape[0] * 16)
        assert torch.equal(module.unpack_table(planes, bits, dtype, shape[0]), table)


def test_layout_by_hand() -> None:
    """Columns 32 t + e of a block share byte e; table words hold low bytes of four entries, then high bytes."""
    codes = torch.zeros(16, 256, dtype=torch.uint8)
    codes[3, 5], codes[3, 32 + 5], codes[3, 64 + 5] = 9, 14, 3
    packed = module.pack_codes(codes, 4)
    assert packed[0, 0, 0, 3, 5] == 0xE9
    assert packed[0, 0, 1, 3, 5] == 0x03
    assert packed.count_nonzero() == 2
    codes = torch.zeros(16, 256, dtype=torch.uint8)
    codes[0, 7], codes[0, 6 * 32 + 7] = 5, 6  # a code of the first group, and one of the fourth
    packed = module.pack_codes(codes, 3)
    assert packed[0, 0, :, 0, 7].tolist() == [0x05, 0x08, 0x08]
    table = torch.tensor([[0x0102, 0x0304, 0x0506, 0x0708]], dtype=torch.int16).view(torch.float16)
    assert module.pack_table(table)[:, 0].tolist() == [0x08060402, 0x07050301]


def test_two_bits_by_hand() -> None:
    codes = torch.zeros(16, 256, dtype=torch.uint8)
    codes[0, 9], codes[0, 32 + 9], codes[0, 64 + 9], codes[0, 7 * 32 + 9] = 1, 2, 3, 3
    assert module.pack_codes(codes, 2)[0, 0, :, 0, 9].tolist() == [0x2D, 0xC0]


def test_no_codes_are_refused() -> None:
    codes = torch.full((3, 5), 8, dtype=torch.uint8)
    with pytest.raises(InputError, match="beyond its table"):
        module.pack_codes(codes, 3)
    with pytest.raises(InputError, match="bits"):
        module.pack_codes(codes, 5)
    for bad in (codes.int(), codes[0]):
        with pytest.raises(InputError, match="matrix of bytes"):
            module.pack_codes(bad, 4)
