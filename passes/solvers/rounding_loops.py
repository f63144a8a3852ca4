"""The loops of GPTQ: rounding column after column, and going over the columns again.

Everything here is transposed, ``[in, rows]``: a column of the weight lies contiguous.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompiler import numerics
from qcompiler.numerics import QuantSpec, fp4

__all__ = ["Grid", "descend", "round_with_feedback", "to_codes"]

_BLOCK = 32  # columns; with `_ROWS`, a vector-matrix product stays below the size at which BLAS starts threads


@dataclass(frozen=True)
class Grid:
    """What a code may be, transposed for the loop.

    A *step* is a code less its zero point, so that symmetric and asymmetric formats run through the same arithmetic.

    Attributes:
        scale: float32 ``[groups, rows]``, contiguous; ``low`` and ``high``, the inclusive bounds of a step, likewise.
        group: the group of every column, in the order columns are taken.
        float_spec: of codes that are floats; None: steps are whole numbers.
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    group: list[int]
    float_spec: QuantSpec | None = None

    @classmethod
    def of(cls, scale: Tensor, zero: Tensor, spec: QuantSpec, group: Tensor) -> "Grid":
        """From scales and zero points ``[rows, groups]`` and the group of every column, in order."""
        low, high = (spec.quant_min - zero).T.contiguous(), (spec.quant_max - zero).T.contiguous()
        return cls(scale.T.contiguous(), low, high, group.tolist(), spec if spec.is_float else None)


def round_with_feedback(errors: Tensor, feedback: Tensor, grid: Grid) -> Tensor:
    """Rounds every column given the errors of those before it.

    Args:
        errors: float32 ``[in, rows]``; the target on entry, target less rounded value on return.
        feedback: from `_feedback`, ``[in, in]``.
        grid: the number format.

    Returns:
        Steps, float32 ``[in, rows]``.
    """
    steps = torch.empty_like(errors)
    for start in range(0, len(errors), _BLOCK):
        block = slice(start, start + _BLOCK)
        wanted = torch.addmm(errors[block], feedback[block, :start], errors[:start])
        _round_block(
            wanted, errors[block], feedback[block, block], errors[block], steps[block], grid, grid.group[block]
        )
    return steps


def descend(
    errors: Tensor,
    steps: Tensor,
    gram: Tensor,
    ridge: Tensor,
    grid: Grid,
    sweeps: int,
    scale_dtype: torch.dtype | None,
) -> None:
    """Refits every scale, then re-rounds every column given the errors of all others, in place.

    With the others fixed, ``tr(E H Eᵀ)`` is least where column ``i`` of the weight is ``q_i + (H E)_i / H_ii``. Without
    a ``scale_dtype`` scales stay.
    """
    hessian = gram + torch.diag(ridge)
    change = torch.empty_like(errors[:_BLOCK])
    for _ in range(sweeps):
        if scale_dtype is not None:
            _refit_scales(errors, steps, hessian, grid, scale_dtype)
        for start in range(0, len(errors), _BLOCK):
            block = slice(start, start + _BLOCK)
            groups = grid.group[block]
            value = steps[block] * grid.scale[groups]
            weights = hessian[block] / hessian.diagonal()[block, None]
            wanted = torch.addmm(value, weights, errors)
            changed = change[: len(groups)]
            _round_block(wanted, value, weights[:, block].contiguous(), changed, steps[block], grid, groups)
            errors[block] += changed


def _refit_scales(errors: Tensor, steps: Tensor, hessian: Tensor, grid: Grid, scale_dtype: torch.dtype) -> None:
    """Moves each scale to where ``tr(E H Eᵀ)`` is least for the codes as they are, group after group, in place.

    With ``q`` the steps of a group, the loss changes by ``δ² qᵀHq - 2 δ qᵀ(H E)`` when its scale grows by ``δ``.
    """
    group = torch.tensor(grid.group, device=errors.device)
    for index in range(len(grid.scale)):
        columns = (group == index).nonzero()[:, 0]
        rows = hessian[columns]
        q = steps[columns]
        slope = (torch.mm(rows, errors) * q).sum(0)
        curvature = (torch.mm(rows[:, columns], q) * q).sum(0)
        old = grid.scale[index]
        new = numerics.round_scale(old + torch.where(curvature > 0, slope / curvature, 0.0), scale_dtype)
        delta = new - old
        better = (delta * (delta * curvature - 2 * slope) < 0) & (new < 2 * old) & (new > old / 2)
        delta = torch.where(better, delta, 0.0)
        errors[columns] -= delta * q
        grid.scale[index] = torch.where(better, new, old)


def _round_block(
    wanted: Tensor, base: Tensor, feedback: Tensor, residual: Tensor, steps: Tensor, grid: Grid, groups: list[int]
) -> None:
    """The loop over the columns of one block: writes ``steps`` and ``residual = base - steps * scale``.

    Column ``j`` is rounded to the step nearest ``wanted[j] + Σ_{k<j} feedback[j, k] · residual[k]``. ``feedback`` is
    ``[block, block]``, every other tensor ``[block, rows]`` with contiguous rows. ``wanted`` is overwritten;
    ``residual`` may be ``base``.
    """
    if wanted.device.type != "cpu":
        _round_block_torch(wanted, base, feedback, residual, steps, grid, groups)
        return
    scales, lows, highs = grid.scale.numpy(), grid.low.numpy(), grid.high.numpy()
    errors, weights = residual.numpy(), feedback.numpy()
    scratch: NDArray[np.float32] = np.empty(wanted.shape[1], np.float32)
    for j, (value, start, step, error) in enumerate(
        zip(wanted.numpy(), base.numpy(), steps.numpy(), errors, strict=True)
    ):
        group = groups[j]
        scale = scales[group]
        if j:
            np.dot(weights[j, :j], errors[:j], out=scratch)
            np.add(value, scratch, out=value)
        np.divide(value, scale, out=step)
        if grid.float_spec is None:
            np.rint(step, out=step)
        np.maximum(step, lows[group], out=step)
        np.minimum(step, highs[group], out=step)
        if grid.float_spec is not None:
            steps[j] = numerics.round_codes(steps[j], grid.float_spec)
        np.multiply(step, scale, out=scratch)
        np.subtract(start, scratch, out=error)


def _round_block_torch(
    wanted: Tensor, base: Tensor, feedback: Tensor, residual: Tensor, steps: Tensor, grid: Grid, groups: list[int]
) -> None:
    """`_round_block` where numpy cannot reach the memory."""
    scratch = torch.empty_like(wanted[0])
    for j, group in enumerate(groups):
        value, step, scale = wanted[j], steps[j], grid.scale[group]
        if j:
            value.addmv_(residual[:j].T, feedback[j, :j])
        torch.div(value, scale, out=step)
        if grid.float_spec is None:
            step.round_()
        torch.maximum(step, grid.low[group], out=step)
        torch.minimum(step, grid.high[group], out=step)
        if grid.float_spec is not None:
            step.copy_(numerics.round_codes(step, grid.float_spec))
        torch.mul(step, scale, out=scratch)
        torch.sub(base[j], scratch, out=residual[j])


def to_codes(steps: Tensor, order: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Codes ``[rows, in]`` in the weight's own column order, from steps ``[in, rows]`` in the loop's."""
    codes = torch.empty_like(steps)
    codes[order] = steps
    codes = codes.T
    if spec.is_fp4:
        return fp4.encode(codes)
    if not spec.symmetric:
        codes = codes + numerics.expand_groups(zero, codes.shape[1], spec.group_of(codes.shape[1]))
    return codes.to(spec.code_dtype)
