"""What operators ask of a device, and which of their implementations they chose for it."""

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

__all__ = ["Choice", "Device"]

Implementation = Literal["triton", "library", "cpu", "reference"]


@dataclass(frozen=True)
class Device:
    """A device, as far as the choice of a kernel depends on it.

    Attributes:
        kind: ``cpu``, ``cuda``, or another; PyTorch calls AMD's devices ``cuda`` too, they are ``hip`` here.
        name: as the driver calls it; empty for a CPU.
        capability: CUDA compute capability as one number, 90 for 9.0; 0 for a CPU.
        has_triton: whether Triton can be imported.
    """

    kind: str
    name: str = ""
    capability: int = 0
    has_triton: bool = False

    @classmethod
    def of(cls, device: torch.device | str) -> "Device":
        """The device itself."""
        return _described(torch.device(device))


@cache
def _described(device: torch.device) -> Device:
    has_triton = importlib.util.find_spec("triton") is not None
    if device.type != "cuda":
        return Device(device.type, has_triton=has_triton)
    if torch.version.hip is not None:  # inline assembly is NVIDIA's
        return Device("hip", torch.cuda.get_device_name(device), has_triton=has_triton)
    major, minor = torch.cuda.get_device_capability(device)
    return Device("cuda", torch.cuda.get_device_name(device), 10 * major + minor, has_triton)


@dataclass(frozen=True)
class Choice:
    """The implementation an operator takes for a device, dtype and shape.

    Attributes:
        implementation: ``triton``: a kernel of ours; ``library``: one of PyTorch's, on CUDA; ``cpu``: a low-bit
            operator of PyTorch, on the CPU; ``reference``: dequantized, then computed in floating point.
        reason: why not a better one; empty where there is none.
    """

    implementation: Implementation
    reason: str = ""

    def __post_init__(self) -> None:
        if self.implementation == "reference" and not self.reason:
            raise ValueError("falling back to the reference needs a reason")

    @property
    def is_fused(self) -> bool:
        """Whether codes go into the arithmetic without a dequantized matrix being written."""
        return self.implementation != "reference"
