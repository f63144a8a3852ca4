"""Which configuration is launched for a shape, and what a search tries."""

import itertools

import pytest

from qcompiler.lowering.kernels.weight_only_config import (
    SPLITS,
    Config,
    configs,
    default_config,
    default_shapes,
    shapes_for,
)
from qcompiler.lowering.kernels.weight_only_layout import Layout

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
                assert Layout.of(bits, width, width).tiles(width) >= 4 * config.split


def test_rows_decide():
    found = [default_config(rows, 8192, 8192, 4).rows for rows in (1, 8, 9, 16, 17, 64, 65, 384, 385, 4096)]
    assert found == [8, 8, 16, 16, 64, 64, 128, 128, 0, 0]
    found = [default_config(rows, 8192, 8192, 4, capability=80).rows for rows in (8, 16, 32, 33, 128, 129)]
    assert found == [8, 16, 32, 64, 64, 0]
    assert default_shapes(89) == default_shapes(80) != default_shapes(90)


def test_few_output_channels_are_split_until_the_device_is_full():
    assert [default_config(1, out, 8192, 4).split for out in (1024, 4096, 8192, 65536)] == [16, 8, 4, 1]
    assert default_config(1, 4096, 1024, 4).split == 2  # 8 tiles, at least 4 in a piece
    assert default_config(1, 4096, 256, 4).split == 1
    assert default_config(256, 8192, 8192, 4).split == 1


def test_a_search_is_small_and_has_alternatives():
    for rows in (1, 16, 64, 256, 2048):
        assert 2 < len(configs(rows, 8192, 8192, 4)) <= 50
    assert any(config.rows == 0 for config in configs(256, 8192, 8192, 4))
    assert all(config.rows for config in configs(1, 8192, 8192, 4))
