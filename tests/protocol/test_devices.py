"""Devices by name."""

import pytest
import torch

from qcompiler.errors import InputError
from qcompiler.protocol.devices import choose_device


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("abacus", "meta"):
        with pytest.raises(InputError) as caught:
            choose_device(name)
        assert caught.value.got == name
