"""Codes and tables that keep the output of a layer, from those that keep its weights.

Notation: ``W [out, in]`` the target, ``Q`` what it is rounded to, ``E = W - Q``, ``H = X'X + ridge`` the damped Gram
matrix of the layer's input. The output changes by ``tr(E H E')``, which two steps lower in turn, neither ever raising
it:

* *tables*: with the codes as they are, row ``r`` of ``Q`` is ``P c`` for a matrix ``P [in, levels]`` of zeros and ones,
  so its best table solves ``P'H P c = P'H w``: ``levels`` equations per row. That is the center of k-means in the
  metric of ``H``;
* *codes*: with the tables as they are and all other columns fixed, the error is least where column ``i`` of ``Q`` is
  nearest to ``q_i + (E H)_i / H_ii`` (coordinate descent; QuantEase, arXiv 2309.01885, does so on a grid).

Everything is transposed, ``[in, rows]``, so that a column of the weight is contiguous.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["damped", "improve", "shifted"]

_BLOCK = 32  # columns; what changes in a block reaches the errors of all others in one matrix product
_ELEMENTS = 1 << 22  # of the matrices P that are held at a time
_RIDGE = 1e-6  # of the mean diagonal of P'HP: a value that no code uses stays


def damped(gram: Tensor, damping: float) -> Tensor:
    """``H``: float32 ``[in, in]``, with ``damping`` times the mean of what is not zero added to the diagonal."""
    diagonal = gram.diagonal()
    alive = diagonal > 0
    mean = diagonal[alive].mean() if bool(alive.any()) else diagonal.new_ones(())
    return gram + torch.diag(torch.where(alive, damping, 1.0) * mean)


def shifted(weight: Tensor, cross: Tensor, gram: Tensor, hessian: Tensor, correction: float) -> Tensor:
    """``W + correction W (Y'X - X'X) H^-1``: a target that makes good a part of what was changed ahead of the layer.

    ``Y`` is the input the original model sees at this place. With ``correction`` 1 it minimizes ``|X Q' - Y W'|^2``,
    the objective of GPTAQ (arXiv 2504.02692).

    Args:
        weight: float32 ``[out, in]``.
        cross: ``Y'X``, float32 ``[in, in]``.
        gram: ``X'X``.
        hessian: from `damped`.
        correction: how much of it, in [0, 1]; all of it also fits the noise of the calibration tokens.
    """
    factor = torch.linalg.cholesky(hessian.double()).float()
    drift = (cross - gram).masked_fill(gram.diagonal() == 0, 0)
    return weight + correction * torch.cholesky_solve(drift.T @ weight.T, factor).T


def improve(
    target: Tensor, codes: Tensor, table: Tensor, hessian: Tensor, apart: Tensor | None, rounds: int
) -> tuple[Tensor, Tensor]:
    """Lowers ``tr(E H E')`` by turns of codes and tables, codes first and last.

    Args:
        target: float32 ``[out, in]``.
        codes: uint8 ``[out, in]``, a start.
        table: ``[out, levels]``, ascending, in the dtype it is stored in.
        hessian: ``H``, float32 ``[in, in]``, positive definite.
        apart: boolean ``[out, in]``, weights that are kept apart: without error, whatever their codes; or None.
        rounds: turns of the codes, 0 or more.

    Returns:
        Codes and table in the form they were given.
    """
    codes, table = codes.clone(), table.clone()
    for turn in range(rounds):
        for rows in _parts(target, table.shape[1]):
            kept = None if apart is None else apart[rows]
            if turn:
                codes[rows], table[rows] = _refitted(target[rows], codes[rows], table[rows], hessian, kept)
            codes[rows] = _descended(target[rows], codes[rows], table[rows].float(), hessian, kept)
    return codes, table


def _parts(target: Tensor, levels: int) -> Iterator[slice]:
    rows = max(1, _ELEMENTS // (target.shape[1] * levels))
    return (slice(start, start + rows) for start in range(0, len(target), rows))


def _error(target: Tensor, codes: Tensor, table: Tensor, apart: Tensor | None) -> Tensor:
    error = target - table.gather(1, codes.long())
    return error if apart is None else error.masked_fill_(apart, 0)


def _refitted(
    target: Tensor, codes: Tensor, table: Tensor, hessian: Tensor, apart: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best tables for codes as they are, rounded; rows that rounding would make worse stay."""
    levels = table.shape[1]
    chosen = torch.nn.functional.one_hot(codes.long(), levels).to(target.dtype)  # [rows, in, levels]
    if apart is not None:
        chosen.masked_fill_(apart[:, :, None], 0)
    weighted = torch.matmul(hessian, chosen)
    curvature = torch.matmul(chosen.transpose(1, 2), weighted).double()
    slope = torch.matmul(weighted.transpose(1, 2), _error(target, codes, table.float(), apart)[:, :, None]).double()
    ridge = curvature.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=torch.finfo(torch.float32).tiny) * _RIDGE
    step = torch.linalg.solve(curvature + torch.diag_embed(ridge[:, None].expand(-1, levels)), slope)
    limit = torch.finfo(table.dtype).max
    moved = (table.double() + step[:, :, 0]).clamp_(-limit, limit).to(table.dtype)
    step = (moved.double() - table.double())[:, :, None]
    change = (step * (torch.matmul(curvature, step) - 2 * slope)).sum((1, 2))
    better = (change < 0)[:, None]
    moved, order = torch.where(better, moved, table).sort(-1)
    return order.argsort(-1).gather(1, codes.long()).to(codes.dtype), moved


def _descended(target: Tensor, codes: Tensor, table: Tensor, hessian: Tensor, apart: Tensor | None) -> Tensor:
    """Every column rounded anew given the errors of all others, once."""
    values = table.T.contiguous()
    middle = (values[1:] + values[:-1]) / 2
    errors = _error(target, codes, table, apart).T.contiguous()
    rounded = table.gather(1, codes.long()).T.contiguous()
    found = codes.T.contiguous()
    free = None if apart is None else (~apart).T.contiguous()
    for start in range(0, len(errors), _BLOCK):
        block = slice(start, start + _BLOCK)
        weights = hessian[block] / hessian.diagonal()[block, None]
        wanted = torch.addmm(rounded[block], weights, errors)
        inside, changes = weights[:, block].contiguous(), torch.zeros_like(wanted)
        for j, value in enumerate(wanted):
            if j:
                value.addmv_(changes[:j].T, inside[j, :j])
            code = (middle < value).sum(0)
            change = rounded[start + j] - values.gather(0, code[None])[0]
            if free is not None:
                change *= free[start + j]
            changes[j] = change
            found[start + j] = code
        errors[block] += changes
    return found.T.contiguous()
