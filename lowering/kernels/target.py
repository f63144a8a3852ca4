"""What kernels make of a quantized linear layer or cache, said before anything is calibrated."""

from dataclasses import dataclass
from typing import Literal

import torch

from qcompiler.errors import TargetError
from qcompiler.ir import CacheFormat, Graph
from qcompiler.lowering.kernels.cache import append as cache_append
from qcompiler.lowering.kernels.cache import decode_attention
from qcompiler.lowering.kernels.codebook_linear import operator as codebook_linear
from qcompiler.lowering.kernels.launch.device import Choice, Device
from qcompiler.lowering.kernels.scaled_linear import operator as scaled_linear
from qcompiler.lowering.kernels.weight_only import operator as weight_only
from qcompiler.numerics import Scheme
from qcompiler.protocol import Support

__all__ = ["ON_A_CPU", "KernelsTarget"]

_DEVICES = {"cpu": Device("cpu"), "cuda": Device("cuda", "of compute capability 9.0", 90, has_triton=True)}
_DTYPE = torch.bfloat16
_HEAD_WIDTH = 128
ON_A_CPU = "on a CPU, small models decode faster as ONNX, which needs no PyTorch either"


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
            return self._support(scaled_linear.choose(weight, activation, width, width, device, _DTYPE))
        if weight.codebook:
            choice = codebook_linear.choose(weight, width, width, 0, device, _DTYPE)
            return self._support(choice) if self.device == "cuda" else Support("runs", choice.reason)
        return self._support(weight_only.choose(weight, width, width, device, _DTYPE))

    def supports_cache(self, spec: CacheFormat) -> Support:
        """What becomes of a key-value cache: written in place, and read by one operator for a few new tokens."""
        device = _DEVICES[self.device]
        append = cache_append.choose(spec, _HEAD_WIDTH, device)
        attention = decode_attention.choose(spec, spec, _HEAD_WIDTH, device, _DTYPE)
        return self._support(attention if append.is_fused else append)

    def check_graph(self, graph: Graph) -> None:
        """Nothing is refused: what has no kernel is computed as the graph does."""

    def _support(self, choice: Choice) -> Support:
        notes = (choice.reason, ON_A_CPU if self.device == "cpu" and choice.is_fused else "")
        return Support("fused" if choice.is_fused else "runs", "; ".join(filter(None, notes)))
