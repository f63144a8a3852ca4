"""What a quantized weight is: codes with their scales (`Affine`)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.spec import QuantSpec

__all__ = ["Affine", "QuantizedTensor"]


@dataclass(frozen=True)
class Affine:
    """``(codes - zero_point) * scale``, one scale per tensor, output channel or group of input channels.

    Attributes:
        codes: int8 (symmetric), uint8 (asymmetric) or float8 ``[out, in]``, one code per element.
        scale: float32 ``[out or 1, groups]``; every value is exact in ``scale_dtype``.
        zero_point: uint8, the shape of ``scale``; None where symmetric.
        spec: the number format.
        scale_dtype: the dtype the scale is stored in.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    scale_dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """float32 ``[out, in]``."""
        return numerics.dequantize(self.codes, self.scale, self.zero_point, self.spec)

    @property
    def stored_bits(self) -> int:
        """Bits of packed codes, scales and zero points (a file rounds each row of codes up to whole bytes)."""
        bits = self.codes.numel() * self.spec.bits + self.scale.numel() * self.scale_dtype.itemsize * 8
        return bits + (0 if self.zero_point is None else self.zero_point.numel() * self.spec.bits)


QuantizedTensor = Affine
