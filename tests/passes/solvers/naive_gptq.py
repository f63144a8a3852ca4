"""GPTQ as plain loops, and what its tests are made of."""

from dataclasses import replace

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.ir.qtensor import Affine
from qcompiler.numerics.spec import QuantSpec
from qcompiler.passes.solvers.gptq_solver import GPTQSolution, solve_gptq

ROWS, WIDTH, TOKENS = 24, 56, 200  # more than one block of columns; groups of 16 leave a short one


def make_inputs(tokens: int = TOKENS, width: int = WIDTH) -> Tensor:
    """Correlated inputs of uneven size, as activations are."""
    mixing = torch.randn(width, width, dtype=torch.float64) / width**0.5 + torch.eye(width, dtype=torch.float64)
    return (
        torch.randn(tokens, width, dtype=torch.float64) @ mixing * torch.logspace(-1, 1, width)[torch.randperm(width)]
    )


DAMPING = 0.05  # the default


def gram_of(x: Tensor, y: Tensor | None = None) -> Tensor:
    return (x if y is None else y).T @ x


def spec_of(bits: int = 4, symmetric: bool = True, granularity: str = "per_group") -> QuantSpec:
    return QuantSpec(
        dtype=f"int{bits}",
        granularity=granularity,  # type: ignore[arg-type]
        group_size=16 if granularity == "per_group" else None,
        symmetric=symmetric,
    )


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def column_qparams(qtensor: Affine) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every element, float64."""
    rows, width = qtensor.codes.shape
    group = qtensor.spec.group_of(width)
    zero = torch.zeros_like(qtensor.scale) if qtensor.zero_point is None else qtensor.zero_point.float()
    scale, zero = (numerics.expand_groups(t, width, group).expand(rows, width) for t in (qtensor.scale, zero))
    return scale.double(), zero.double()


def naive_gptq(weight: Tensor, gram: Tensor, qtensor: Affine, damping: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """GPTQ as equations 2 and 3 of arXiv 2210.17323 put it, column by column, the inverse Hessian updated explicitly.

    Scales and zero points are those of ``qtensor``. Returns the codes and, for every code, how far the value rounded
    was from the border between two codes, in steps.
    """
    spec = qtensor.spec
    scale, zero = column_qparams(qtensor)
    w, codes, margin = weight.double().clone(), torch.zeros(weight.shape), torch.zeros(weight.shape)
    inverse = torch.linalg.inv(damped(gram, damping))
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(gram))
    for i in order.tolist():
        steps = w[:, i] / scale[:, i]
        codes[:, i] = (torch.round(steps) + zero[:, i]).clamp(spec.quant_min, spec.quant_max)
        margin[:, i] = ((steps - steps.floor()) - 0.5).abs()
        error = (w[:, i] - (codes[:, i] - zero[:, i]) * scale[:, i]) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, :] = inverse[:, i] = 0
        inverse[i, i] = 1
    return codes, margin


def naive_refit(weight: Tensor, hessian: Tensor, qtensor: Affine) -> Tensor:
    """The best scale of one group after the other for the codes as they are, rounded to bfloat16."""
    scale, (_, zero) = qtensor.scale.clone(), column_qparams(qtensor)
    steps, group = qtensor.codes.double() - zero, qtensor.spec.group_of(weight.shape[1])
    for g in range(scale.shape[1]):
        error = weight.double() - steps * column_qparams(replace(qtensor, scale=scale))[0]
        part = torch.zeros_like(steps)
        part[:, g * group : (g + 1) * group] = steps[:, g * group : (g + 1) * group]
        change = (error @ hessian * part).sum(1) / (part @ hessian * part).sum(1)
        scale[:, g] = (scale[:, g] + change).to(torch.bfloat16).float()
    return scale


def naive_descent(
    weight: Tensor, hessian: Tensor, codes: Tensor, qtensor: Affine, order: Tensor
) -> tuple[Tensor, Tensor]:
    """One sweep of coordinate descent over the columns in order, by the definition of the optimum of each."""
    spec = qtensor.spec
    scale, zero = column_qparams(qtensor)
    codes, margin = codes.double().clone(), torch.zeros(weight.shape)
    for i in order.tolist():
        error = weight.double() - (codes - zero) * scale
        error[:, i] = 0
        steps = (weight[:, i] + error @ hessian[:, i] / hessian[i, i]) / scale[:, i]
        codes[:, i] = (torch.round(steps) + zero[:, i]).clamp(spec.quant_min, spec.quant_max)
        margin[:, i] = ((steps - steps.floor()) - 0.5).abs()
    return codes.float(), margin


def assert_codes(found: Tensor, expected: Tensor, margin: Tensor, order: Tensor) -> None:
    """Equal codes, but for rows where float32 fell on the other side of a border that float64 nearly touched.

    From such a place on a row's later codes rightly differ, for they make good another error.
    """
    differs = (found.float() != expected)[:, order]
    rows = differs.any(1)
    first = differs.float().argmax(1)
    near = margin[:, order].gather(1, first[:, None])[:, 0] < 1e-4
    assert bool(near[rows].all()), f"codes differ away from any border in {int((rows & ~near).sum())} rows"
    assert int(rows.sum()) <= max(1, len(found) // 20)


def order_of(gram: Tensor, act_order: bool = True) -> Tensor:
    return gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(gram))


def solve(weight: Tensor, gram: Tensor, spec: QuantSpec, **options: object) -> GPTQSolution:
    (solution,) = solve_gptq([weight], gram, spec, torch.bfloat16, **options)  # type: ignore[arg-type]
    return solution


NAN, EYE, WEIGHT = float("nan"), torch.eye(8), torch.ones(2, 8)
