"""Reference arithmetic of quantization: plain, exact, and what every faster implementation is compared with.

Weights are ``[out, in]``. Scales have one column per group along ``in``: ``[out, groups]`` for ``per_group``,
``[out, 1]`` for ``per_channel``, ``[1, 1]`` for ``per_tensor``, and for ``per_block`` ``[out, groups]``, equal in all
rows of a block; zero points have the shape of their scale.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qcompiler.numerics import fp4
from qcompiler.numerics.spec import QuantSpec

__all__ = [
    "dequantize",
    "expand_groups",
    "fake_quantize",
    "gram_error",
    "quantize",
    "round_codes",
    "round_scale",
    "slices",
    "sqnr_db",
]

_SLICE_ELEMENTS = 1 << 18  # worked on at once where one slice after another will do: the temporaries stay in the cache


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds positive scales to the dtype they are stored in and returns them in float32.

    A scale of zero (an all-zero group) becomes 1; one that the dtype would flush to zero or infinity becomes its
    smallest or largest positive number, so that every stored scale is positive and finite. Subnormal numbers are used
    in float16 alone, where small weights need them (int8 below 0.008) and every processor reads them.
    """
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps if dtype == torch.float16 else info.tiny
    scale = torch.where(scale > 0, scale.float(), 1.0)
    return scale.clamp(smallest, info.max).to(dtype).float()


def expand_groups(per_group: Tensor, width: int, group: int) -> Tensor:
    """Repeats ``[rows, groups]`` along the last axis to ``[rows, width]``; the last group may be short."""
    if per_group.shape[-1] == 1:
        return per_group.expand(*per_group.shape[:-1], width)
    return per_group.repeat_interleave(group, dim=-1)[..., :width]


def slices(x: Tensor) -> Iterator[slice]:
    """Rows that are worked on at once."""
    rows = max(1, _SLICE_ELEMENTS // max(1, x[:1].numel()))
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def _rows(qparams: Tensor, part: slice) -> Tensor:
    """The scales or zero points of some rows, which may share one."""
    return qparams if len(qparams) == 1 else qparams[part]


def round_codes(values: Tensor, spec: QuantSpec) -> Tensor:
    """Values in units of the scale, zero point taken off, to the nearest code in float32; clamped, ties to even.

    Clamped before the cast where codes are floats: what a cast does beyond the largest one differs between libraries.
    """
    if spec.is_fp4:
        return fp4.round_to_grid(values)
    if spec.is_float:
        return values.clamp(spec.quant_min, spec.quant_max).to(spec.code_dtype).float()
    return torch.round(values).clamp_(spec.quant_min, spec.quant_max)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Codes ``clamp(round(x / scale) + zero_point)``, rounding half to even (ONNX QuantizeLinear).

    Float codes are ``clamp(x / scale)``, cast; half to even as well.

    Args:
        x: float ``[rows, width]``.
        scale: float32 ``[rows or 1, groups]``.
        zero_point: the same shape, or None where symmetric.
        spec: the number format; groups are ``spec.group_of(width)`` long.

    Returns:
        Codes of ``spec.code_dtype``, ``[rows, width]``.
    """
    width = x.shape[-1]
    group = spec.group_of(width)
    codes = torch.empty(x.shape, dtype=spec.code_dtype, device=x.device)
    for part in slices(x):
        values = x[part].float() / expand_groups(_rows(scale, part), width, group)
        if spec.is_fp4:
            codes[part] = fp4.encode(values)
            continue
        if spec.is_float:
            codes[part] = values.clamp_(spec.quant_min, spec.quant_max).to(spec.code_dtype)
            continue
        values.round_()
        if zero_point is not None:
            values += expand_groups(_rows(zero_point, part).float(), width, group)
        codes[part] = values.clamp_(spec.quant_min, spec.quant_max)
    return codes


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """float32 ``(codes - zero_point) * scale``; shapes as in `quantize`."""
    width = codes.shape[-1]
    group = spec.group_of(width)
    values = fp4.decode(codes) if spec.is_fp4 else codes.float()
    for part in slices(codes):
        if zero_point is not None:
            values[part] -= expand_groups(_rows(zero_point, part).float(), width, group)
        values[part] *= expand_groups(_rows(scale, part), width, group)
    return values


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """`quantize`, then `dequantize`: float in, float32 out."""
    return dequantize(quantize(x, scale, zero_point, spec), scale, zero_point, spec)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB: ``10 log10(sum(ref^2) / sum((ref - approx)^2))``; inf where equal."""
    signal = noise = 0.0
    parts = (tensor.reshape(-1).split(_SLICE_ELEMENTS) for tensor in (reference, approximation))
    for exact, rounded in zip(*parts, strict=True):
        signal += exact.double().square().sum().item()
        noise += torch.sub(exact.double(), rounded.double()).square_().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def gram_error(error: Tensor, gram: Tensor) -> float:
    """``tr(E G E')``: the squared error of a linear layer's output, summed over the rows of its input.

    Args:
        error: of the weight, float32 ``[out, in]``.
        gram: second moments of the input, float32 ``[in, in]``.
    """
    return float((torch.mm(error, gram) * error).sum(dtype=torch.float64))
