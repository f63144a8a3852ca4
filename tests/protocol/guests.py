"""Quantizers as guests write them, and what they are tried on."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from qcompiler.ir.qtensor import Affine, QuantizedTensor
from qcompiler.numerics import QuantSpec, min_max_qparams
from qcompiler.protocol.solution import round_to_nearest
from qcompiler.protocol.weight_quantizer import WeightQuantizer

ROWS = [(torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(1)),)]


@dataclass(frozen=True)
class Nearest(WeightQuantizer):
    """One function."""

    def quantize(self, weight: Tensor, gram: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Affine:
        return Affine.of(weight, *min_max_qparams(weight, spec, scale_dtype), spec, scale_dtype)


@dataclass(frozen=True)
class Uncalibrated(WeightQuantizer):
    """Wants no Gram matrix."""

    is_calibrated: ClassVar[bool] = False

    def quantize(
        self, weight: Tensor, gram: Tensor | None, spec: QuantSpec, scale_dtype: torch.dtype
    ) -> QuantizedTensor:
        assert gram is None
        return round_to_nearest(weight, spec, scale_dtype)


@dataclass(frozen=True)
class OnlyIntegers(Nearest):
    def refuses(self, spec: QuantSpec) -> str | None:
        return "float codes are not for me" if spec.is_float else None


class Called(nn.Module):
    """Calls one layer on two values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(torch.relu(self.first(x)))))
        return out


INPUTS = [(torch.randn(16, 8, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
