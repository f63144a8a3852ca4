"""What kernels make of a quantized linear layer or cache, said before anything is calibrated."""

from dataclasses import dataclass
from typing import Literal

import torch

from qcompiler.errors import TargetError
from qcompiler.graph import Graph
from qcompiler.kv_cache import CacheFormat
from qcompiler.lowering.kernels import cache_append, codebook_linear, decode_attention, scaled_linear, weight_only
from qcompiler.lowering.kernels.device import Choice, Device
from qcompiler.spec import Scheme
from qcompiler.target import Support

__all__ = ["KernelsTarget"]

_DEVICES = {"cpu": Device("cpu"), "cuda": Device("cuda", "of compute capability 9.0", 90, has_triton=True)}
_DTYPE = torch.bfloat16
_HEAD_WIDTH = 128


@dataclass(frozen=True)
class KernelsTarget:
    """Fused low-bit operators in a callable module; nothing is written.

    Answers are for square layers, heads of 128 channels and bfloat16 activations; on CUDA for compute capability 9.0
    with Triton. What an actual layer came to is in the report of the lowered model. Every format runs; what has no
    kernel is dequantized.

    Attributes:
        device: ``cpu`` or ``cuda``.

    Raises:
        TargetError: for another device.
    """

    device: Literal["cpu", "cuda"] = "cuda"

    def __post_init__(self) -> None:
        if self.device not in _DEVICES:
            raise TargetError("no kernels for this device", got=self.device, expected=", ".join(_DEVICES))

    @property
    def name(self) -> str:
        """``kernels``."""
        return "kernels"

    def supports(self, scheme: Scheme, width: int) -> Support:
        """What becomes of a linear layer of ``width`` input channels under ``scheme``."""
        device, weight, activation = _DEVICES[self.device], scheme.weight, scheme.activation
        if weight is None:
            return Support("runs", "float weights with rounded activations") if activation else Support("fused")
        if activation is not None:
            return _support(scaled_linear.choose(weight, activation, width, width, device, _DTYPE))
        if weight.codebook:
            choice = codebook_linear.choose(weight, width, width, 0, device, _DTYPE)
            return _support(choice) if self.device == "cuda" else Support("runs", choice.reason)
        return _support(weight_only.choose(weight, width, width, device, _DTYPE))

    def supports_cache(self, spec: CacheFormat) -> Support:
        """What becomes of a key-value cache: written in place, and read by one operator for a few new tokens."""
        device = _DEVICES[self.device]
        append = cache_append.choose(spec, _HEAD_WIDTH, device)
        attention = decode_attention.choose(spec, spec, _HEAD_WIDTH, device, _DTYPE)
        return _support(attention if append.is_fused else append)

    def check_graph(self, graph: Graph) -> None:
        """Nothing is refused: what has no kernel is computed as the graph does."""


def _support(choice: Choice) -> Support:
    return Support("fused" if choice.is_fused else "runs", choice.reason)
