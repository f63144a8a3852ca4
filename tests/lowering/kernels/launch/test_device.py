"""Devices as kernels see them, and what was chosen for them."""

import pytest
import torch

from qcompiler.lowering.kernels.cache import decode_attention
from qcompiler.lowering.kernels.launch.device import Choice, Device


def test_a_cpu():
    device = Device.of("cpu")
    assert device == Device.of(torch.device("cpu"))
    assert (device.kind, device.name, device.capability) == ("cpu", "", 0)


def test_a_gpu_that_is_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Device.of("cuda:7") == Device("cuda", "a card", 89, has_triton=False)


def test_devices_of_amd_are_not_taken_for_those_of_nvidia(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    device = Device.of("cuda:6")
    assert (device.kind, device.name, device.capability) == ("hip", "a card", 0)
    assert decode_attention.choose(None, None, 128, device, torch.float16).implementation == "reference"


def test_falling_back_needs_a_reason():
    with pytest.raises(ValueError, match="needs a reason"):
        Choice("reference")
    assert not Choice("reference", "no kernel").is_fused
    assert all(Choice(name).is_fused for name in ("triton", "library", "cpu"))
