"""What kernels make of a quantized linear layer or cache, said before anything is calibrated."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from typing_extensions import Doc

from qcompiler.errors import TargetError
from qcompiler.ir import CacheFormat, Graph
from qcompiler.lowering.kernels.cache import append as cache_append
from qcompiler.lowering.kernels.cache import decode_attention
from qcompiler.lowering.kernels.codebook_linear import operator as codebook_linear
from qcompiler.lowering.kernels.launch.device import Choice, Device
from qcompiler.lowering.kernels.scaled_linear import operator as scaled_linear
from qcompiler.lowering.kernels.weight_only import operator as weight_only
from qcompiler.numerics import Scheme
from qcompiler.protocol import Lowered, Reader, Support, Target, choose_device

if TYPE_CHECKING:
    from qcompiler.lowering.kernels.module.model import KernelModel

__all__ = ["ON_A_CPU", "KernelsTarget"]

_DEVICES = {"cpu": Device("cpu"), "cuda": Device("cuda", "of compute capability 9.0", 90, has_triton=True)}
_DTYPE = torch.bfloat16
_HEAD_WIDTH = 128
ON_A_CPU = "on a CPU, small models decode faster as ONNX, which needs no PyTorch either"


@dataclass(frozen=True)
class KernelsTarget(Target):
    """Fused low-bit operators in a callable module; nothing is written.

    Answers are for square layers, heads of 128 channels and bfloat16 activations; on CUDA for compute capability 9.0
    with Triton. What an actual layer came to is in the report of the lowered model. Every format runs; what has no
    kernel is dequantized.

    Raises:
        TargetError: for a device or dtype that there are no kernels for.
    """

    device: Annotated[str, Doc("Where it will run: cpu, cuda, cuda:1, ... or auto, which is cuda where there is.")] = (
        "auto"
    )
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        Doc("Of activations; by default bfloat16, or float16 on CUDA where the model is not in bfloat16."),
    ] = None
    tune: Annotated[bool, Doc("Search for the fastest launch configurations on this device, and keep them.")] = False

    name: ClassVar[str] = "kernels"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device.partition(":")[0] not in ("auto", *_DEVICES):
            raise TargetError("no kernels for this device", got=self.device, expected=f"auto, {', '.join(_DEVICES)}")

    def supports(self, scheme: Scheme, width: int) -> Support:
        """What becomes of a linear layer of ``width`` input channels under ``scheme``."""
        device, weight, activation = self._described_device(), scheme.weight, scheme.activation
        if weight is None:
            return Support("runs", "float weights with rounded activations") if activation else Support("fused")
        if activation is not None:
            return self._support(scaled_linear.choose(weight, activation, width, width, device, _DTYPE))
        if weight.codebook:
            choice = codebook_linear.choose(weight, width, width, 0, device, _DTYPE)
            return self._support(choice) if device.kind == "cuda" else Support("runs", choice.reason)
        return self._support(weight_only.choose(weight, width, width, device, _DTYPE))

    def supports_cache(self, spec: CacheFormat) -> Support:
        """What becomes of a key-value cache: written in place, and read by one operator for a few new tokens."""
        if spec.per_head:
            return Support("refused", "no kernel has a static scale for each head", "choose kv-fp8-static or kv-fp8")
        device = self._described_device()
        append = cache_append.choose(spec, _HEAD_WIDTH, device)
        attention = decode_attention.choose(spec, spec, _HEAD_WIDTH, device, _DTYPE)
        return self._support(attention if append.is_fused else append)

    def lower(self, graph: Graph, directory: Path | None) -> Lowered:
        """A `qcompiler.lowering.kernels.KernelModel`; what has no kernel is computed as the graph does."""
        from qcompiler.lowering.kernels.module.model import lower

        place = choose_device(self.device)
        return self._lowered(lower(graph, device=place, dtype=self.dtype, tune=self.tune))

    def lower_streamed(self, graph: Graph) -> Lowered:
        """As `lower`, in pieces; as a whole where the fastest launch configurations are searched for."""
        from qcompiler.lowering.kernels.module.streamed import lower_streamed

        place = choose_device(self.device)
        if self.tune and place.type == "cuda":
            return self.lower(graph, None)
        return self._lowered(lower_streamed(graph, device=place, dtype=self.dtype))

    def _lowered(self, model: "KernelModel") -> Lowered:
        reader = Reader(lambda: model, tolerance=0.0, dtype=model.dtype, rounded=model.rounded)
        return Lowered(model.report, model, [reader], str(model.device))

    @classmethod
    def variants(cls) -> Mapping[str, Target]:
        """On CUDA and on a CPU, whatever is there."""
        return {"kernels (CUDA)": cls("cuda"), "kernels (CPU)": cls("cpu")}

    def _described_device(self) -> Device:
        if self.device == "auto":
            return _DEVICES["cuda" if torch.cuda.is_available() else "cpu"]
        return _DEVICES[self.device.partition(":")[0]]

    def _support(self, choice: Choice) -> Support:
        notes = (choice.reason, ON_A_CPU if self._described_device().kind == "cpu" and choice.is_fused else "")
        return Support("fused" if choice.is_fused else "runs", "; ".join(filter(None, notes)))
