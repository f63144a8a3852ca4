"""What rounding the input of a linear layer does to its output, tried on a sample of rows."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.numerics import QuantSpec

__all__ = ["RoundingTrial", "output_error", "round_rows", "try_rounding"]

_canonical = torch.ops.qcompiler


@dataclass(frozen=True)
class RoundingTrial:
    """What rounding did to a sample.

    Attributes:
        input_sqnr_db: signal over noise of the input itself.
        output_sqnr_db: of the layer's output, see `output_error`.
    """

    input_sqnr_db: float
    output_sqnr_db: float


def try_rounding(
    rows: Tensor, weight: Tensor, spec: QuantSpec, scale: Tensor | None, zero_point: Tensor | None
) -> RoundingTrial:
    """Rounds a sample of a layer's input.

    Args:
        rows: float32 ``[n, in]``.
        weight: float32 ``[out, in]``.
        spec, scale, zero_point: as `round_rows` takes them.
    """
    rounded = round_rows(rows, spec, scale, zero_point)
    share = output_error(rows, rounded, weight)
    return RoundingTrial(numerics.sqnr_db(rows, rounded), -10 * math.log10(share) if share else math.inf)


def round_rows(rows: Tensor, spec: QuantSpec, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """Rows as the graph will round them.

    Args:
        rows: float32 ``[n, channels]``.
        spec: the number format.
        scale, zero_point: 0-D, where the format is static; in NVFP4 ``scale`` is the factor of the tensor.

    Returns:
        float32 ``[n, channels]``.
    """
    if spec.is_fp4:
        block = spec.group_of(rows.shape[-1])
        scales = _canonical.fp4_scale(rows, scale, block, spec.exponent == "floor")
        codes = _canonical.fp4_quantize(rows, scales, scale, block)
        dequantized: Tensor = _canonical.fp4_dequantize(codes, scales, scale, block)
        return dequantized
    width = rows.shape[-1]
    axis, block = spec.input_place(width)
    if spec.dynamic:
        scale, zero_point = _canonical.choose_qparams(rows, *spec.range_options(width))
        zero_point = None if spec.symmetric else zero_point
    assert scale is not None
    codes = _canonical.quantize(rows, scale, zero_point, axis, block, spec.code_dtype, *spec.narrow_bits())
    dequantized = _canonical.dequantize(codes, scale, zero_point, axis, block, torch.float32)
    return dequantized


def output_error(rows: Tensor, rounded: Tensor, weight: Tensor) -> float:
    """How much the output of a layer changes when its input is rounded, as a share of the output's square.

    The mean over rows of ``2 |(x' - x) Wᵀ|² / (|x Wᵀ|² + mean |x Wᵀ|²)``: for a typical row the relative error, and no
    more than twice that of the mean row for one that gives nearly nothing. What follows is normalized row by row, so an
    error summed over all rows would let a few large ones hide what happens to the others.

    Args:
        rows, rounded: float32 ``[n, in]``.
        weight: float32 ``[out, in]``.
    """
    energy = torch.mm(rows, weight.T).square_().sum(-1, dtype=torch.float64)
    wrong = torch.mm(rounded - rows, weight.T).square_().sum(-1, dtype=torch.float64)
    least = torch.finfo(torch.float32).tiny
    return float((2 * wrong / (energy + energy.mean()).clamp(min=least)).mean())
