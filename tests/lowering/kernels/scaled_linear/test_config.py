"""How products are split: what is chosen fits the device and the shape."""

import pytest
import torch

from qcompiler.lowering.kernels.launch.machine_code import SHARED_MEMORY
from qcompiler.lowering.kernels.scaled_linear.config import configs, default_config


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_configurations_fit_the_device(codes, capability):
    for rows in (1, 3, 8, 17, 64, 65, 4096):
        for outputs, width in ((64, 64), (4096, 4096), (28672, 8192), (151936, 896)):
            found = configs(rows, outputs, width, codes, capability)
            assert found[0] == default_config(rows, outputs, width, codes, capability)
            assert len(found) == len(set(found))
            for config in found:
                assert config.library or config.shared_bytes <= SHARED_MEMORY.get(capability, 99 * 1024)
                assert config.library or rows > 64 or config.rows >= rows
                assert config.splits == 1 or width >= config.splits * config.depth
    assert default_config(2048, 4096, 4096, torch.int8, capability).library
    assert not default_config(2048, 4095, 4096, torch.int8, capability).library
    assert not default_config(2048, 4096, 4096, torch.float8_e5m2, capability).library


def test_few_tiles_are_split_and_many_are_not():
    assert default_config(1, 1024, 8192, torch.int8, 90).splits > 1
    assert default_config(1, 28672, 8192, torch.int8, 90).splits == 1
    assert default_config(1, 1024, 256, torch.int8, 90).splits == 1


def test_blocks_of_scales_hold_whole_tiles():
    for rows in (1, 64, 4096):
        for config in configs(rows, 4096, 4096, torch.float8_e4m3fn, 90, has_blocks=True):
            assert not config.library
            assert 128 % config.columns == 0
            assert 128 % config.depth == 0
