"""Scales and zero points of weights: those of the range, and those searched for a smaller error.

Shapes are those of `qcompiler.numerics.arithmetic`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qcompiler.numerics import fp4
from qcompiler.numerics.arithmetic import fake_quantize, round_scale, slices
from qcompiler.numerics.spec import QuantSpec

__all__ = ["gram_qparams", "min_max_qparams", "mse_qparams", "range_qparams", "scale_factor"]

_FP4_E4M3_STEPS = tuple(step for step in range(-6, 6) if step)  # there are 8 to a factor of two
_FP4_E8M0_STEPS = (-1, 1)


def _grouped(x: Tensor, spec: QuantSpec) -> Tensor:
    """``[rows, width]`` → ``[rows, groups, group]``, a short last group padded by repeating its last element."""
    width = x.shape[-1]
    group = spec.group_of(width)
    x = x.float()
    if width % group:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], group - width % group)], dim=-1)
    return x.reshape(*x.shape[:-1], -1, group)


def _group_range(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The least and the largest value per group; widened to hold zero where there is a zero point."""
    low, high = groups.amin(-1), groups.amax(-1)  # faster than aminmax
    return (low, high) if spec.symmetric else (low.clamp(max=0), high.clamp(min=0))


def _over_blocks(values: Tensor, spec: QuantSpec, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``[rows, groups]``, each row replaced by what those of its block reduce to; zeros fill up the last block."""
    assert spec.group_size is not None
    padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % spec.group_size))
    blocks = reduce(padded.unflatten(0, (-1, spec.group_size)), 1)
    return blocks.repeat_interleave(spec.group_size, dim=0)[: len(values)]


def _full_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """The scale at which the codes just span a range."""
    if spec.is_float:
        return torch.maximum(-low, high) / spec.quant_max
    if spec.symmetric:
        return torch.maximum(-low, high) / ((1 << spec.bits) - 1) * 2
    return (high - low) / spec.quant_max


def min_max_qparams(x: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover the range of each group.

    Symmetric: ``scale = amax / ((2^b - 1) / 2)`` (``amax / 7.5`` at 4 bits: the largest magnitude is clipped by half a
    step on the positive side, and every other value gains resolution). Asymmetric: the range is widened to hold zero,
    and ``scale = (max - min) / (2^b - 1)``. Float codes: ``scale = amax / 448`` (E4M3), ``amax / 57344`` (E5M2).

    4-bit floats: `fp4.block_scale`; the factor of the tensor, `scale_factor`, is multiplied in.

    Args:
        x: float ``[rows, width]``.
        spec: the number format.
        scale_dtype: the dtype scales are stored in.

    Returns:
        ``scale`` float32 ``[rows or 1, groups]``, already rounded to ``scale_dtype``, and ``zero_point`` or None.
    """
    if spec.is_fp4:
        factor = scale_factor(x, spec)
        return fp4.decode_scale(_fp4_scale(x, spec, factor), factor), None
    low, high = _group_range(_grouped(x, spec), spec)
    if spec.granularity == "per_tensor":
        low, high = low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    elif spec.granularity == "per_block":
        low, high = _over_blocks(low, spec, torch.amin), _over_blocks(high, spec, torch.amax)
    return range_qparams(low, high, spec, scale_dtype)


def range_qparams(low: Tensor, high: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point at which the codes span ``[low, high]``; the rules of `min_max_qparams`.

    Args:
        low, high: float32, any shape, with zero between them where there is a zero point.
        spec: the number format.
        scale_dtype: the dtype scales are stored in.

    Returns:
        Both of the shape of ``low``; the scale in float32, already rounded to ``scale_dtype``.
    """
    scale = round_scale(_full_scale(low, high, spec), scale_dtype)
    if spec.symmetric:
        return scale, None
    return scale, torch.round(-low / scale).clamp_(spec.quant_min, spec.quant_max).to(spec.code_dtype)


def scale_factor(x: Tensor, spec: QuantSpec) -> Tensor | None:
    """What the stored scales of a tensor are relative to: 0-D float32, or None where they are not (all but NVFP4).

    Args:
        x: float, any shape.
        spec: the number format.
    """
    return fp4.tensor_factor(x.abs().amax()) if spec.has_factor else None


def _fp4_scale(x: Tensor, spec: QuantSpec, factor: Tensor | None) -> Tensor:
    """Stored scales ``[rows, groups]`` that cover the range of each group."""
    return fp4.block_scale(_grouped(x, spec).abs().amax(-1), factor, floor=spec.exponent == "floor")


def _fp4_search(x: Tensor, spec: QuantSpec, error: Callable[[Tensor], Tensor]) -> Tensor:
    """The scale of every group that has the least error, of the representable ones next to that of the full range.

    Args:
        x: float ``[rows, width]``.
        spec: the number format.
        error: from the rounding error of some rows, float32, which may be overwritten: that of each group.
    """
    factor = scale_factor(x, spec)
    stored = _fp4_scale(x, spec, factor)
    found = fp4.decode_scale(stored, factor)
    for part in slices(x):
        full = found[part]
        best, least = full, error(fake_quantize(x[part], full, None, spec) - x[part].float())
        for steps in _FP4_E4M3_STEPS if spec.has_factor else _FP4_E8M0_STEPS:
            scale = fp4.decode_scale(fp4.neighbour(stored[part], steps), factor)
            wrong = error(fake_quantize(x[part], scale, None, spec) - x[part].float())
            better = wrong < least
            best, least = torch.where(better, scale, best), torch.where(better, wrong, least)
        found[part] = best
    return found


def mse_qparams(
    x: Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    *,
    importance: Tensor | None = None,
    steps: int = 16,
    max_shrink: float = 0.8,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point with a small squared rounding error per group, never a larger one than `min_max_qparams`.

    Codes are made for a grid of shrunken ranges, dense near the full one. For given codes ``q`` (zero point taken off)
    the best scale is known, ``s = Σwqx / Σwq²``, and so is its error, ``Σwx² - (Σwqx)² / Σwq²``: the codes with the
    least win, and their scale is kept if, rounded to the stored dtype and with codes made anew, it beats the full
    range. Scales of 4-bit floats are so few that each one near that of the full range is tried.

    Args:
        x: float ``[rows, width]``.
        spec: the number format.
        scale_dtype: the dtype scales are stored in.
        importance: optional float ``[width]``, not negative: the weight of each column's squared error (the Gram
            diagonal).
        steps: number of candidate ranges, at least 1.
        max_shrink: the smallest candidate keeps ``1 - max_shrink`` of the full range; in ``[0, 1)``.

    Returns:
        As `min_max_qparams`, with the same zero point.
    """
    if spec.is_fp4:
        cost = torch.ones(x.shape[-1], device=x.device) if importance is None else importance.float()
        return _fp4_search(x, spec, lambda wrong: _group_sums(wrong.square_().mul_(cost), spec)), None
    full, zero = min_max_qparams(x, spec, scale_dtype)
    groups = _grouped(x, spec)
    weight = None if importance is None else _grouped(importance[None], spec)
    padding = groups.shape[-2] * groups.shape[-1] - x.shape[-1]
    if padding:  # must not count
        weight = torch.ones_like(groups[:1]) if weight is None else weight
        weight[..., -1, -padding:] = 0
    if spec.granularity == "per_tensor":
        weight = None if weight is None else weight.expand_as(groups).reshape(1, 1, -1)
        groups = groups.reshape(1, 1, -1)
    rows, side = len(groups), spec.group_size
    if spec.granularity == "per_block":  # a block is one long group
        assert side is not None
        groups = torch.nn.functional.pad(groups, (0, 0, 0, 0, 0, -rows % side)).unflatten(0, (-1, side))
        weight = None if weight is None else weight[:, None].expand(1, side, -1, -1).transpose(1, 2).flatten(2)
        groups, full = groups.transpose(1, 2).flatten(2), full[::side]
    # At the full range of a symmetric format the largest magnitude lies half-way between two codes, where the last bit
    # of an input would decide which one the scale is fitted to: the first candidate is a shade smaller.
    largest = 1 - 2**-10
    shrinks = [largest - (largest + max_shrink - 1) * (step / max(steps - 1, 1)) ** 2 for step in range(steps)]
    scale = torch.empty_like(full)
    memory: Tensor | None = None
    for part in slices(groups):
        memory = groups.new_empty(4, *groups[part].shape) if memory is None else memory
        scale[part] = _search_scale(
            groups[part], full[part], None if zero is None else zero[part], weight, spec, scale_dtype, shrinks, memory
        )
    if spec.granularity == "per_block":
        scale = scale.repeat_interleave(side or 1, dim=0)[:rows]
    return scale, zero


def gram_qparams(
    x: Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    gram: Tensor,
    *,
    steps: int = 16,
    max_shrink: float = 0.6,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point with a small error in ``input @ x.T``, never a larger one than `min_max_qparams`.

    For every group the error ``e G e.T`` is computed over a grid of shrunken ranges, ``e`` being the rounding error of
    the group and ``G`` its block of the Gram matrix; what groups do to each other's error is left out.

    Args:
        x: float ``[rows, width]``.
        spec: the number format.
        scale_dtype: the dtype scales are stored in.
        gram: float32 ``[width, width]``, second moments of the input.
        steps: number of ranges tried, at least 1.
        max_shrink: the smallest range tried keeps ``1 - max_shrink`` of the full one; in ``[0, 1)``.

    Returns:
        As `min_max_qparams`, with the same zero point.
    """
    width, group = x.shape[-1], spec.group_of(x.shape[-1])
    starts = range(0, width, group)

    def group_errors(wrong: Tensor) -> Tensor:
        parts = [
            (wrong[:, start : start + group] @ gram[start : start + group, start : start + group])
            .mul_(wrong[:, start : start + group])
            .sum(-1)
            for start in starts
        ]
        return torch.stack(parts, -1)

    if spec.is_fp4:
        return _fp4_search(x, spec, group_errors), None
    best, zero = min_max_qparams(x, spec, scale_dtype)
    full = best

    def error(scale: Tensor) -> Tensor:
        total = group_errors(fake_quantize(x, scale, zero, spec).sub_(x))
        if spec.granularity == "per_block":
            return _over_blocks(total, spec, torch.sum)
        return total.sum().reshape(1, 1) if spec.granularity == "per_tensor" else total

    least = error(full)
    for step in range(1, steps):
        scale = round_scale(full * (1 - max_shrink * step / max(steps - 1, 1)), scale_dtype)
        found = error(scale)
        better = found < least
        best, least = torch.where(better, scale, best), torch.where(better, found, least)
    return best, zero


def _group_sums(values: Tensor, spec: QuantSpec) -> Tensor:
    """``[rows, width]`` summed over each group."""
    group = spec.group_of(values.shape[-1])
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % group))
    sums: Tensor = padded.unflatten(-1, (-1, group)).sum(-1)
    return sums


def _search_scale(
    groups: Tensor,
    full: Tensor,
    zero: Tensor | None,
    weight: Tensor | None,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    shrinks: list[float],
    memory: Tensor,
) -> Tensor:
    """The search of `mse_qparams` for ``[rows, groups, group]``, in units of the scale of the full range.

    Args:
        groups: the values.
        full: ``[rows, groups]``, the scale of the full range.
        zero: zero points, like ``full``.
        weight: ``[1, groups, group]``.
        spec: the number format.
        scale_dtype: the dtype scales are stored in.
        shrinks: the candidates.
        memory: ``[4, >= rows, groups, group]``, overwritten.
    """
    values, weighted, codes, product = memory[:, : len(groups)].unbind()
    unit = _full_scale(*_group_range(groups, spec), spec)
    unit = torch.where(unit > 0, unit, 1.0)
    torch.div(groups, unit[..., None], out=values)
    if weight is None:
        weighted = values
    else:
        torch.mul(values, weight, out=weighted)
    least = None if zero is None else (spec.quant_min - zero.float())[..., None]
    most = None if zero is None else (spec.quant_max - zero.float())[..., None]

    def make_codes(divisor: float | Tensor) -> None:
        torch.div(values, divisor, out=codes)
        if spec.is_float:
            codes.copy_(codes.clamp_(spec.quant_min, spec.quant_max).to(spec.code_dtype))
            return
        codes.round_()
        if least is None or most is None:
            codes.clamp_(spec.quant_min, spec.quant_max)
        else:
            torch.minimum(torch.maximum(codes, least, out=codes), most, out=codes)

    def error(scale: Tensor) -> Tensor:
        relative = (scale / unit)[..., None]
        make_codes(relative)
        codes.mul_(relative).sub_(values).square_()
        if weight is not None:
            codes.mul_(weight)
        return codes.sum(-1)

    best_gain, best = torch.zeros_like(unit), torch.ones_like(unit)
    for shrink in shrinks:
        make_codes(shrink)
        cross = torch.mul(codes, weighted, out=product).sum(-1)
        torch.mul(codes, codes, out=product)
        power = (product if weight is None else product.mul_(weight)).sum(-1)
        scale = cross / power  # NaN where every code is zero, and never better then
        gain = scale * cross
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, scale, best)
    found = round_scale(best * unit, scale_dtype)
    return torch.where(error(found) < error(full), found, full)
