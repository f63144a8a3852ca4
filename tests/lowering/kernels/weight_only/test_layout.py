import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from qcompiler.lowering.kernels.weight_only.layout import Layout


def random_codes(out: int, width: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (out, width), dtype=torch.uint8, generator=generator)


def naive_code(packed: torch.Tensor, layout: Layout, row: int, column: int) -> int:
    """One code, read as the table in the module says."""
    tile, inside = divmod(column, layout.tile)
    line = packed[tile, row].tolist()
    part, j = divmod(inside, layout.part)
    if layout.bits == 3:
        half, quarter = divmod(part, 4)
        low = line[32 * half + j] >> (2 * quarter) & 3
        return low | (line[64 + j] >> (2 * quarter + half) & 1) << 2
    return line[j] >> (layout.bits * part) & ((1 << layout.bits) - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 1000])
def test_codes_are_where_the_table_says(bits, group):
    width = 300
    layout = Layout.of(bits, group, width)
    codes = random_codes(3, width, bits)
    packed = layout.pack(codes)
    assert packed.shape == (-(-width // layout.tile), 3, layout.tile_bytes)
    assert packed.is_contiguous()
    found = [[naive_code(packed, layout, row, column) for column in range(width)] for row in range(3)]
    assert torch.equal(torch.tensor(found, dtype=torch.uint8), codes)


@given(
    st.sampled_from([2, 3, 4, 8]),
    st.integers(1, 5),
    st.integers(1, 700),
    st.sampled_from([32, 64, 96, 128, 1000]),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_unpacking_gives_back_what_was_packed(bits, out, width, group, seed):
    layout = Layout.of(bits, group, width)
    codes = random_codes(out, width, bits, seed)
    assert torch.equal(layout.unpack(layout.pack(codes), width), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_end_of_the_last_tile_is_zero(bits):
    layout = Layout.of(bits, 1000, 40)
    whole = layout.unpack(layout.pack(random_codes(2, 40, bits)), layout.tile)
    assert layout.tile > 40
    assert (whole[:, 40:] == 1 << (bits - 1)).all()


@pytest.mark.parametrize(
    ("bits", "group", "part", "tile", "tile_bytes"),
    [
        (8, 128, 128, 128, 128),
        (8, 64, 64, 64, 64),
        (8, 96, 32, 32, 32),
        (4, 128, 64, 128, 64),
        (4, 64, 64, 128, 64),
        (4, 32, 32, 64, 32),
        (4, 4096, 64, 128, 64),
        (2, 128, 32, 128, 32),
        (3, 32, 32, 256, 96),
    ],
)
def test_parts_stay_inside_groups(bits, group, part, tile, tile_bytes):
    layout = Layout.of(bits, group, 4096)
    assert (layout.part, layout.tile, layout.tile_bytes) == (part, tile, tile_bytes)
    assert group % layout.part == 0


def test_groups_that_fit():
    assert Layout.fits(128, 4096)
    assert Layout.fits(96, 4096)
    assert not Layout.fits(48, 4096)
    assert Layout.fits(48, 48)
    assert Layout.fits(4096, 4096)
