"""The GPTQ solver: codes for linear layers that read one input, from their weights and the input's Gram matrix.

Notation: ``W [out, in]`` the weight, ``X [tokens, in]`` the input the quantized model sees, ``G = XᵀX`` its Gram
matrix, ``H = G + damping · mean(diag G) · I``. Rounding ``W`` to ``Q`` changes the output, squared and summed over
tokens, by ``tr(E G Eᵀ)`` with ``E = W - Q``.

**Error feedback.** GPTQ (arXiv 2210.17323, algorithm 1) rounds one column after the other and lets the columns to
come make good the error so far, by the rows of the upper Cholesky factor ``U`` of ``H⁻¹ = UᵀU``. The same codes are
found here without inverting anything. Let ``H = R Rᵀ`` with ``R`` upper triangular (``R = U⁻¹``). Then ``tr(E H Eᵀ) =
|E R|²``, column ``i`` of ``E R`` depends on columns ``0..i`` of ``E`` alone, and given those before it is smallest
for::

    q_i = round(w_i + Σ_{k<i} E_k · R[k, i] / R[i, i])

QuIP (arXiv 2307.13304) calls this form LDLQ and proves it equal to GPTQ. It takes one factorisation (``in³/3``
multiplications instead of ``in³``), and feedback is gathered, not scattered: errors made are read, one row is written.

**Layout.** In the loop everything is transposed, ``[in, rows]``, so that a column of the weight is contiguous. Columns
are taken in blocks: feedback from earlier blocks is one matrix product per block, feedback inside the block one
vector-matrix product per column. On the CPU the loop runs on numpy views of the same memory: a numpy call costs a
fraction of a torch call, and a column is a few hundred numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.errors import CalibrationError, RecipeError, WeightError
from qcompiler.ir import Affine
from qcompiler.numerics import QuantSpec
from qcompiler.passes.solvers.rounding_loops import Grid, descend, round_with_feedback, to_codes

__all__ = ["GPTQSolution", "ScaleSearch", "solve_gptq"]

ScaleSearch = Literal["mse", "minmax"]
_ROWS = 4096  # rows solved at a time, so that the errors of a block stay in the cache
_SEARCH_ELEMENTS = 1 << 18  # weights whose scales are searched at a time: bounds the temporaries
_SEARCH_STEPS, _SEARCH_SHRINK = 16, 0.8  # 2 bits want as little as 0.3 of the range; finer steps gain < 0.5 %
_DAMPING_GROWTH = 10.0
_DAMPING_FLOOR = 1e-6  # what growth starts from when no damping was asked for
_DAMPING_LIMIT = 1e3  # beyond this the matrix was no Gram matrix


@dataclass(frozen=True)
class GPTQSolution:
    """One quantized weight and what is worth reporting about it.

    Attributes:
        qtensor: codes and scales.
        damping: what the factorisation succeeded with, as a fraction of the mean diagonal; at least what was asked for.
        dead_columns: how many inputs were zero in every calibration token. Their columns are rounded to nearest.
        loss: ``tr(E G Eᵀ)``, the squared error of the layer's output summed over calibration tokens. ``E`` is the
            distance from the target: the weight, or the corrected weight where a cross Gram matrix was given.
        rtn_loss: the same for round to nearest with min-max scales.
    """

    qtensor: Affine
    damping: float
    dead_columns: int
    loss: float
    rtn_loss: float


def solve_gptq(
    weights: Sequence[Tensor],
    gram: Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
    *,
    act_order: bool = True,
    damping: float = 0.05,
    scale_search: ScaleSearch = "mse",
    sweeps: int = 0,
    cross: Tensor | None = None,
    correction: float = 0.5,
) -> tuple[GPTQSolution, ...]:
    """Quantizes the weights of linear layers that share one input.

    The rows of all weights are solved in one go: one factorisation, one loop over the columns.

    What the options are worth, as KL divergence from the original model relative to round to nearest (a Llama of 7 M
    parameters, int4 in groups of 128, 64 windows of 512 tokens, one seed; another differs by about 0.01): all as by
    default 0.404; in stored order 0.462; min-max scales 0.450; three sweeps 0.394; a cross Gram with correction 0.25,
    0.5 or 1: 0.384, 0.361, 0.386. More damping costs nothing on many tokens and helps on few: 0.05 instead of 0.01
    gains 2 % on 64 windows of 512 and 3 % on 64 of 128 tokens. Refitting scales gains 3 % there.

    Args:
        weights: float ``[out_i, in]`` each, on one device.
        gram: float32 or float64 ``[in, in]``, ``XᵀX`` over the calibration tokens.
        spec: the number format. Groups are static: scales are chosen before columns are reordered, so codes are
            stored in the weight's own column order and no group index is needed.
        scale_dtype: the dtype scales are stored in.
        act_order: take columns by decreasing Gram diagonal: inputs that carry most are rounded first, while many
            columns are left to make good their error.
        damping: added to the diagonal, as a fraction of its mean over the columns that are not dead. Grown tenfold
            until the factorisation succeeds.
        scale_search: ``mse``: per group, the least squared rounding error weighted by ``diag(H)``; ``minmax``: the
            range.
        sweeps: passes of coordinate descent on ``tr(E H Eᵀ)`` over what was found: each scale is moved to its best
            value for the codes as they are, then each column rounded anew given all others (the update of QuantEase,
            arXiv 2309.01885, started from GPTQ's codes). Never raises that loss. A scale that serves a whole tensor
            or a block stays, and so do those of 4-bit floats, whose neighbours are too far away to be reached by a fit.
        cross: optional float ``[in, in]``, ``YᵀX`` where ``Y`` is the input the *original* model sees at this place.
            The target becomes ``W + correction · W (YᵀX - XᵀX) H⁻¹``. With ``correction`` 1 that minimises ``|X Qᵀ -
            Y Wᵀ|²``: the layer also makes good what was changed before it. This is the objective of GPTAQ (arXiv
            2504.02692), solved once ahead of the loop instead of column by column.
        correction: how much of that shift to apply, in [0, 1]. The whole of it also fits the noise of the calibration
            tokens.

    Returns:
        One solution per weight, in order.

    Raises:
        RecipeError: damping, sweeps or correction out of range.
        WeightError: a weight that is not a finite matrix, or widths that differ.
        CalibrationError: a Gram matrix of the wrong shape, not finite, or not positive semi-definite.
    """
    _check_options(damping, sweeps, correction)
    device = weights[0].device if weights else torch.device("cpu")
    width = _check_weights(weights)
    gram = _check_gram(gram, width, "Gram matrix").to(device)
    if bool((gram.diagonal() < 0).any()):
        raise CalibrationError("a Gram matrix has no negative diagonal", where="Gram matrix", got=gram.diagonal().min())
    dead = gram.diagonal() == 0
    if bool(dead.any()):
        gram = gram.masked_fill(dead, 0).masked_fill(dead[:, None], 0)
    alive = width - int(dead.sum())
    mean = float(gram.diagonal().sum(dtype=torch.float64)) / alive if alive else 1.0
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(width, device=device)
    ordered_gram = gram.index_select(0, order).index_select(1, order)  # a third of the time of one 2-D index
    factor, used = _factorise(ordered_gram, dead[order], damping, mean)
    ridge = used * mean + mean * dead.double()

    sizes = [len(weight) for weight in weights]
    original = torch.cat([weight.to(torch.float32) for weight in weights])
    target = original
    if cross is not None and correction:
        drift = _check_gram(cross, width, "cross Gram matrix").to(device).masked_fill(dead, 0) - gram
        target = original + correction * _shift(original, drift, factor, order)
    importance = (gram.diagonal() + ridge).float()
    qparams = [_qparams(part, spec, scale_dtype, scale_search, importance) for part in target.split(sizes)]
    factors = [numerics.scale_factor(part, spec) for part in target.split(sizes)]
    scale_rows = torch.cat([scale.expand(size, -1) for (scale, _), size in zip(qparams, sizes, strict=True)])
    zero_rows = torch.zeros_like(scale_rows)
    if not spec.symmetric:
        zero_rows = torch.cat(
            [z.float().expand(n, -1) for (_, z), n in zip(qparams, sizes, strict=True) if z is not None]
        )

    feedback = _feedback(factor)
    del factor
    gram, ordered_gram = gram.float(), ordered_gram.float()
    group = spec.group_of(width)
    keeps_scales = spec.granularity in ("per_tensor", "per_block") or spec.is_fp4
    codes, losses = [], []
    for start in range(0, len(target), _ROWS):
        rows = slice(start, start + _ROWS)
        grid = Grid.of(scale_rows[rows], zero_rows[rows], spec, order // group)
        errors = target[rows].T[order].contiguous()
        steps = round_with_feedback(errors, feedback, grid)
        if sweeps:
            refit = None if keeps_scales else scale_dtype
            descend(errors, steps, ordered_gram, ridge[order].float(), grid, sweeps, refit)
            scale_rows[rows] = grid.scale.T
        losses.append((torch.mm(ordered_gram, errors) * errors).sum(0, dtype=torch.float64))
        codes.append(to_codes(steps, order, zero_rows[rows], spec))
    solutions = []
    for i, (part_codes, part_loss) in enumerate(
        zip(torch.cat(codes).split(sizes), torch.cat(losses).split(sizes), strict=True)
    ):
        scale, zero = qparams[i]
        if sweeps and not keeps_scales:
            scale = scale_rows.split(sizes)[i].clone()
        nearest = numerics.min_max_qparams(weights[i], spec, scale_dtype)
        rtn_error = target.split(sizes)[i] - numerics.fake_quantize(weights[i], *nearest, spec)
        solutions.append(
            GPTQSolution(
                Affine(part_codes.clone(), scale, zero, spec, scale_dtype, factors[i]),
                damping=used,
                dead_columns=width - alive,
                loss=float(part_loss.sum()),
                rtn_loss=numerics.gram_error(rtn_error, gram),
            )
        )
    return tuple(solutions)


def _check_options(damping: float, sweeps: int, correction: float) -> None:
    for name, value, valid, expected in (
        ("damping", damping, 0 <= damping <= 1, "a number in [0, 1]"),
        ("sweeps", sweeps, sweeps >= 0, "a count, 0 or more"),
        ("correction", correction, 0 <= correction <= 1, "a number in [0, 1]"),
    ):
        if not valid:
            raise RecipeError("an option of GPTQ is out of range", where=name, got=value, expected=expected)


def _check_weights(weights: Sequence[Tensor]) -> int:
    if not weights:
        raise WeightError(
            "no weight to quantize", where="GPTQ", got="an empty sequence", expected="at least one matrix"
        )
    width = weights[0].shape[-1] if weights[0].dim() else 0
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != width or not weight.numel():
            raise WeightError(
                "weights that share an input are matrices of one width",
                where=f"weight {i} of {len(weights)}",
                got=tuple(weight.shape),
                expected=f"[out, {width}]",
            )
        if not bool(torch.isfinite(weight).all()):
            raise WeightError("a weight is not finite", where=f"weight {i} of {len(weights)}", got="NaN or infinity")
    return width


def _check_gram(gram: Tensor, width: int, name: str) -> Tensor:
    if tuple(gram.shape) != (width, width):
        raise CalibrationError(
            "calibration statistics do not fit the weight",
            where=name,
            got=tuple(gram.shape),
            expected=(width, width),
        )
    if not bool(torch.isfinite(gram).all()):
        raise CalibrationError(
            "calibration statistics are not finite",
            where=name,
            got="NaN or infinity",
            remedy="look for NaN, infinity or overflow in the activations of the layers before",
        )
    return gram


def _factorise(gram: Tensor, dead: Tensor, damping: float, mean: float) -> tuple[Tensor, float]:
    """The lower Cholesky factor ``L`` of the damped Gram matrix with its columns in *reversed* order, and the damping.

    Reversing rows and columns of ``L`` gives the upper factor ``R`` of the module's docstring.
    """
    matrix = gram.flip(0, 1).double()
    diagonal = matrix.diagonal() + mean * dead.flip(0)  # no feedback: all else in a dead row is zero
    while True:
        matrix.diagonal().copy_(diagonal + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return factor, damping
        damping = max(damping * _DAMPING_GROWTH, _DAMPING_FLOOR)
        if damping > _DAMPING_LIMIT:
            raise CalibrationError(
                "a Gram matrix is not positive semi-definite, and no damping within reason makes it so",
                where="Gram matrix",
                got=f"no factorisation with {_DAMPING_LIMIT:g} times the mean diagonal added",
                expected="the product of a matrix with its own transpose",
            )


def _feedback(factor: Tensor) -> Tensor:
    """float32 ``F[i, k] = R[k, i] / R[i, i]``, lower triangular, from the factor of `_factorise`."""
    return (factor / factor.diagonal()).float().T.flip(0, 1)


def _shift(weight: Tensor, difference: Tensor, factor: Tensor, order: Tensor) -> Tensor:
    """float32 ``weight @ difference @ H^-1`` through the factor of `_factorise`.

    In float32: the damping bounds the condition of ``H``, and the shift is an estimate from noisy moments.
    """
    backwards = order.flip(0)
    solved = torch.cholesky_solve((difference.float().T @ weight.T)[backwards], factor.float())
    shift = torch.empty_like(solved)
    shift[backwards] = solved
    return shift.T


def _qparams(
    weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, search: ScaleSearch, importance: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of one weight, searched over slices of its rows that fit the cache."""
    if search == "minmax":
        return numerics.min_max_qparams(weight, spec, scale_dtype)
    is_whole = spec.granularity == "per_tensor" or spec.has_factor  # what all rows share is chosen from all
    rows = len(weight) if is_whole else max(1, _SEARCH_ELEMENTS // weight.shape[1])
    if spec.granularity == "per_block":
        assert spec.group_size is not None
        rows = -(-rows // spec.group_size) * spec.group_size
    found = [
        numerics.mse_qparams(
            part, spec, scale_dtype, importance=importance, steps=_SEARCH_STEPS, max_shrink=_SEARCH_SHRINK
        )
        for part in weight.split(rows)
    ]
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None
