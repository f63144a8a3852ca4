"""Reference arithmetic of quantization: plain, exact, and what every faster implementation is compared with.

Weights are ``[out, in]``. Scales have one column per group along ``in``: ``[out, groups]`` for ``per_group``, ``[out, 1]`` for
``per_channel`` and ``[1, 1]`` for ``per_tensor``; zero points have the shape of their scale.
"""

import torch
from torch import Tensor

from qcompiler.spec import QuantSpec

__all__ = [
    "dequantize",
    "expand_groups",
    "fake_quantize",
    "min_max_qparams",
    "mse_qparams",
    "pack_bits",
    "quantize",
    "round_scale",
    "sqnr_db",
    "unpack_bits",
]


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds positive scales to the dtype they are stored in and returns them in float32.

    A scale of zero (an all-zero group) becomes 1; one that the dtype would flush to zero or infinity becomes its smallest
    normal or largest finite number, so that every stored scale is positive and finite.
    """
    info = torch.finfo(dtype)
    scale = torch.where(scale > 0, scale.float(), torch.ones_like(scale, dtype=torch.float32))
    return scale.clamp(info.tiny, info.max).to(dtype).float()


def expand_groups(per_group: Tensor, width: int, group: int) -> Tensor:
    """Repeats ``[rows, groups]`` along the last axis to ``[rows, width]``; the last group may be short."""
    return per_group.repeat_interleave(group, dim=-1)[..., :width]


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Codes ``clamp(round(x / scale) + zero_point)``, rounding half to even (ONNX QuantizeLinear).

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
    codes = torch.round(x.float() / expand_groups(scale, width, group))
    if zero_point is not None:
        codes += expand_groups(zero_point.float(), width, group)
    return codes.clamp_(spec.quant_min, spec.quant_max).to(spec.code_dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """float32 ``(codes - zero_point) * scale``; shapes as in `quantize`."""
    width = codes.shape[-1]
    group = spec.group_of(width)
    values = codes.float()
    if zero_point is not None:
        values -= expand_groups(zero_point.float(), width, group)
    return values.mul_(expand_groups(scale, width, group))


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """`quantize`, then `dequantize`: float in, float32 out."""
    return dequantize(quantize(x, scale, zero_point, spec), scale, zero_point, spec)


def _grouped(x: Tensor, spec: QuantSpec) -> Tensor:
    """``[rows, width]`` → ``[rows, groups, group]``, a short last group padded by repeating its last element."""
    width = x.shape[-1]
    group = spec.group_of(width)
    x = x.float()
    if width % group:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], group - width % group)], dim=-1)
    return x.reshape(*x.shape[:-1], -1, group)


def _range_qparams(
    low: Tensor, high: Tensor, spec: QuantSpec, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    if spec.symmetric:
        amax = torch.maximum(-low, high)
        return round_scale(amax / ((1 << spec.bits) - 1) * 2, scale_dtype), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = round_scale((high - low) / spec.quant_max, scale_dtype)
    zero_point = torch.round(-low / scale).clamp_(spec.quant_min, spec.quant_max)
    return scale, zero_point.to(spec.code_dtype)


def min_max_qparams(x: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover the range of each group.

    Symmetric: ``scale = amax / ((2^b - 1) / 2)`` (``amax / 7.5`` at 4 bits: the largest magnitude is clipped by half a step
    on the positive side, and every other value gains resolution). Asymmetric: the range is widened to hold zero, and
    ``scale = (max - min) / (2^b - 1)``.

    Args:
        x: float ``[rows, width]``.
        spec: the number format.
        scale_dtype: the dtype scales are stored in.

    Returns:
        ``scale`` float32 ``[rows or 1, groups]``, already rounded to ``scale_dtype``, and ``zero_point`` or None.
    """
    groups = _grouped(x, spec)
    low, high = groups.amin(-1), groups.amax(-1)
    if spec.granularity == "per_tensor":
        low, high = low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    return _range_qparams(low, high, spec, scale_dtype)


def mse_qparams(
    x: Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    *,
    importance: Tensor | None = None,
    steps: int = 40,
    max_shrink: float = 0.6,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point with the least squared rounding error per group, over a grid of shrunken ranges.

    Args:
        x: float ``[rows, width]``.
        spec: the number format.
        scale_dtype: the dtype scales are stored in.
        importance: optional float ``[width]``, the weight of each column's squared error (the Gram diagonal).
        steps: number of candidate ranges.
        max_shrink: the smallest candidate keeps ``1 - max_shrink`` of the full range.

    Returns:
        As `min_max_qparams`.
    """
    groups = _grouped(x, spec)
    low, high = groups.amin(-1), groups.amax(-1)
    if spec.granularity == "per_tensor":
        low, high = low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    weight = torch.ones(1) if importance is None else _grouped(importance[None], spec)[0]
    if x.shape[-1] % groups.shape[-1]:  # padding must not count
        weight = weight.expand(groups.shape[-2:]).clone()
        weight[-1, x.shape[-1] % groups.shape[-1] :] = 0
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = _range_qparams(low, high, spec, scale_dtype)
    for step in range(steps):
        keep = 1.0 - max_shrink * step / steps
        scale, zero = _range_qparams(low * keep, high * keep, spec, scale_dtype)
        codes = torch.round(groups / scale[..., None])
        if zero is not None:
            codes += zero.float()[..., None]
        codes.clamp_(spec.quant_min, spec.quant_max)
        if zero is not None:
            codes -= zero.float()[..., None]
        error = codes.mul_(scale[..., None]).sub_(groups).square_().mul_(weight).sum(-1)
        if spec.granularity == "per_tensor":
            error = error.sum().reshape(1, 1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs integer codes into a dense little-endian bit stream per row.

    Code ``i`` of a row occupies bits ``[i*bits, (i+1)*bits)``, least significant first; signed codes are stored in two's
    complement. At 4 bits that is ONNX's layout: the first element in the low nibble.

    Args:
        codes: int8 or uint8 ``[..., width]``.
        bits: 1 to 8.

    Returns:
        uint8 ``[..., ceil(width * bits / 8)]``.
    """
    if bits == 8:
        return codes.view(torch.uint8).clone()
    width = codes.shape[-1]
    values = codes.view(torch.uint8) & ((1 << bits) - 1)
    if bits in (2, 4):
        per_byte = 8 // bits
        if width % per_byte:
            values = torch.nn.functional.pad(values, (0, per_byte - width % per_byte))
        values = values.reshape(*values.shape[:-1], -1, per_byte)
        packed = values[..., 0].clone()
        for i in range(1, per_byte):
            packed |= values[..., i] << (bits * i)
        return packed
    stream = (values[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    stream = stream.reshape(*codes.shape[:-1], width * bits)
    if stream.shape[-1] % 8:
        stream = torch.nn.functional.pad(stream, (0, 8 - stream.shape[-1] % 8))
    stream = stream.reshape(*stream.shape[:-1], -1, 8) << torch.arange(8, dtype=torch.uint8)
    return stream.sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, width: int, *, signed: bool) -> Tensor:
    """The inverse of `pack_bits`: int8 (signed) or uint8 codes ``[..., width]``."""
    if bits == 8:
        values = packed.clone()
    elif bits in (2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        values = ((packed[..., None] >> shifts) & ((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)[..., :width]
    else:
        stream = ((packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(*packed.shape[:-1], -1)
        stream = stream[..., : width * bits].reshape(*packed.shape[:-1], width, bits)
        values = (stream << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    if not signed:
        return values.contiguous()
    shift = 8 - bits
    return ((values << shift).view(torch.int8) >> shift).contiguous()


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB: ``10 log10(sum(ref^2) / sum((ref - approx)^2))``; inf where equal."""
    noise = (reference.double() - approximation.double()).square().sum().item()
    signal = reference.double().square().sum().item()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64))) if signal else float("-inf")
