"""What ONNX Runtime makes of a quantized linear layer, said before anything is calibrated."""

from dataclasses import dataclass

from qcompiler.errors import TargetError
from qcompiler.spec import Scheme
from qcompiler.target import Support

__all__ = ["OPSETS", "OnnxTarget"]

OPSETS = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
"""Operator sets that can be written, and the IR version each goes with."""

_SMALLEST_FUSED_BLOCK = 16


@dataclass(frozen=True)
class OnnxTarget:
    """ONNX with blocked DequantizeLinear, run by ONNX Runtime.

    Runtime facts are those of ONNX Runtime 1.32 on a CPU: ``DequantizeLinear → MatMul`` becomes one ``MatMulNBits``
    where the block is a power of two of at least 16, or a scale serves a whole channel or tensor.

    Attributes:
        opset: the ONNX operator set, 21 to 25.

    Raises:
        TargetError: for another operator set.
    """

    opset: int = 21

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise TargetError(
                "this operator set cannot be written",
                got=self.opset,
                expected=f"{min(OPSETS)} (the first with blocked int4 weights) to {max(OPSETS)} (the last of TensorRT)",
            )

    @property
    def name(self) -> str:
        """``onnx``."""
        return "onnx"

    @property
    def ir_version(self) -> int:
        """The ONNX IR version written."""
        return OPSETS[self.opset]

    def supports(self, scheme: Scheme, width: int) -> Support:
        """What becomes of a linear layer of ``width`` input channels under ``scheme``."""
        spec = scheme.weight
        if spec is None:
            return Support("fused")
        widened = ""
        if spec.bits == 3 or (spec.bits == 2 and self.opset < 25):
            widened = f"{spec.bits}-bit codes are stored in 4 bits: exact, but larger than they need be"
        if spec.group_size is None or spec.group_size >= width:
            return Support("fused", widened)
        group = spec.group_size
        if group == 1:
            return Support("refused", "one scale per weight takes more room than the weight")
        if group & (group - 1) or group < _SMALLEST_FUSED_BLOCK:
            reason = (
                f"groups of {group}: ONNX Runtime fuses powers of two from {_SMALLEST_FUSED_BLOCK} on; "
                "others are dequantized anew in every run"
            )
            return Support("runs", f"{reason}; {widened}" if widened else reason)
        return Support("fused", widened)
