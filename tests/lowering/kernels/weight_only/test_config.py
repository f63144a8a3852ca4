"""Which configuration is launched for a shape, and what a search tries."""

import itertools

import pytest

from qcompiler.lowering.kernels.weight_only.config import (
    SPLITS,
    Config,
    configs,
    default_config,
    fits,
    shapes_for,
)
from qcompiler.lowering.kernels.weight_only.layout import Layout

SHAPES = [(4096, 4096), (8192, 8192), (11008, 4096), (4096, 11008), (96, 64), (1, 32)]


@pytest.mark.parametrize("capability", [80, 90])
def test_every_choice_is_one_that_is_compiled_ahead_of_time(capability):
    known = {*shapes_for(capability), Config(0)}
    for rows, (out, width), bits in itertools.product((1, 4, 5, 16, 17, 64, 100, 300, 5000), SHAPES, (2, 3, 4, 8)):
        space = configs(rows, out, width, bits, capability=capability)
        assert space[0] == default_config(rows, out, width, bits, capability=capability)
        assert len(set(space)) == len(space)
        for config in space:
            assert config.split in SPLITS
            unsplit = Config(**{**vars(config), "split": 1})
            assert unsplit in known
            if config.split > 1:
                assert Layout.of(bits, width, width).tiles(width) >= 4 * config.split * max(1, config.depth)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_what_is_chosen_fits_the_shared_memory(capability):
    for rows, (out, width), bits in itertools.product((1, 5, 16, 17, 64, 128), SHAPES, (2, 3, 4, 8)):
        for config in configs(rows, out, width, bits, capability=capability):
            assert fits(config, Layout.of(bits, width, width), capability)


def test_shared_memory_is_that_of_the_tiles_under_way():
    config = Config(8, 32, depth=8, warps=8)  # three steps of eight tiles: 8 x 128 activations, 32 x 64 bytes
    assert 3 * 8 * (2 * 8 * 128 + 32 * 64) == 98304
    assert fits(config, Layout.of(4, 128, 4096), 90)
    assert fits(config, Layout.of(4, 128, 4096), 89)  # 99 KiB
    assert not fits(config, Layout.of(8, 128, 4096), 89)
    assert [default_config(8, 4096, 4096, bits, capability=89).depth for bits in (4, 8)] == [8, 4]


def test_rows_decide():
    found = [default_config(rows, 8192, 8192, 4).rows for rows in (1, 4, 5, 8, 9, 16, 17, 64, 65, 384, 385, 4096)]
    assert found == [4, 4, 8, 8, 16, 16, 64, 64, 128, 128, 0, 0]
    assert [default_config(rows, 8192, 8192, 3).rows for rows in (64, 65, 192, 193)] == [64, 64, 64, 0]
    found = [default_config(rows, 8192, 8192, 4, capability=80).rows for rows in (8, 16, 32, 33, 128, 129)]
    assert found == [8, 16, 32, 64, 64, 0]


def test_few_output_channels_are_shared_by_more_warps():
    for rows, out, expected in (
        (1, 4096, (32, 8)),
        (1, 8192, (32, 8)),
        (1, 11008, (32, 4)),
        (16, 4096, (32, 8)),
        (16, 8192, (64, 8)),
        (16, 11008, (64, 4)),
    ):
        config = default_config(rows, out, 4096, 4)
        assert (config.out, config.depth, config.warps) == (*expected, expected[1])
        assert config.split == 1


def test_input_channels_are_split_where_the_device_would_be_idle():
    assert [default_config(1, out, 16384, 4).split for out in (64, 256, 2048)] == [4, 4, 1]
    assert default_config(1, 64, 1024, 4).split == 1  # one step of eight tiles
    assert [default_config(64, out, 8192, 4).split for out in (1024, 8192, 65536)] == [16, 4, 1]
    assert default_config(256, 8192, 8192, 4).split == 1


def test_a_search_is_small_and_has_alternatives():
    for rows in (1, 16, 64, 256, 2048):
        assert 2 < len(configs(rows, 8192, 8192, 4)) <= 50
    assert any(config.rows == 0 for config in configs(256, 8192, 8192, 4))
    assert all(config.rows for config in configs(1, 8192, 8192, 4))
