"""The loops on every device and for every kind of code, beside the naive ones."""

import itertools

import pytest
import torch

from qcompiler import numerics
from qcompiler.numerics import fp4
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from qcompiler.passes.solvers import gptq_solver as _gptq_solver
from qcompiler.passes.solvers import rounding_loops
from qcompiler.passes.solvers.gptq_solver import solve_gptq
from tests.passes.solvers.naive_gptq import (
    DAMPING,
    ROWS,
    WIDTH,
    assert_codes,
    column_qparams,
    damped,
    gram_of,
    make_inputs,
    naive_descent,
    naive_gptq,
    naive_refit,
    order_of,
    solve,
    spec_of,
)


@pytest.mark.parametrize("path", ["slices of rows", "torch"])
def test_other_paths_equal_the_naive_reference(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "torch":
        monkeypatch.setattr(rounding_loops, "_round_block", rounding_loops._round_block_torch)
    else:
        monkeypatch.setattr(_gptq_solver, "_ROWS", 7)
        monkeypatch.setattr(_gptq_solver, "_SEARCH_ELEMENTS", 5 * WIDTH)
    weight, gram = torch.randn(ROWS, WIDTH), gram_of(make_inputs())
    found = solve(weight, gram, spec_of(symmetric=False)).qtensor
    assert_codes(found.codes, *naive_gptq(weight, gram, found, DAMPING, True), order_of(gram))


def test_a_sweep_equals_naive_coordinate_descent() -> None:
    weight, gram, spec = torch.randn(ROWS, WIDTH), gram_of(make_inputs()), spec_of(symmetric=False)
    before, after = solve(weight, gram, spec), solve(weight, gram, spec, sweeps=1)
    hessian = damped(gram, DAMPING)
    scale = naive_refit(weight, hessian, before.qtensor)
    assert (after.qtensor.scale == scale).float().mean() > 0.98  # bfloat16 may tip the other way
    assert (after.qtensor.scale != before.qtensor.scale).float().mean() > 0.5
    expected, margin = naive_descent(weight, hessian, before.qtensor.codes, after.qtensor, order_of(gram))
    assert_codes(after.qtensor.codes, expected, margin, order_of(gram))
    assert not torch.equal(before.qtensor.codes, after.qtensor.codes)


def test_one_scale_for_a_tensor_stays_one() -> None:
    weight, gram, spec = torch.randn(ROWS, WIDTH), gram_of(make_inputs()), spec_of(granularity="per_tensor")
    before, after = solve(weight, gram, spec), solve(weight, gram, spec, sweeps=2)
    assert torch.equal(before.qtensor.scale, after.qtensor.scale)
    assert after.loss < before.loss


@pytest.mark.parametrize("bits", [2, 4])
def test_sweeps_lower_the_loss(bits: int) -> None:
    weight, gram = torch.randn(ROWS, WIDTH), gram_of(make_inputs())
    losses = []
    for sweeps in range(5):
        solution = solve(weight, gram, spec_of(bits), sweeps=sweeps)
        error = (weight - solution.qtensor.dequantize()).double()
        assert solution.loss == pytest.approx(float((error @ gram * error).sum()), rel=1e-4)
        losses.append(float((error @ damped(gram, DAMPING) * error).sum()))
    assert losses[1] < 0.98 * losses[0]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("device_loop", [False, True])
def test_float_codes(dtype, granularity, device_loop, monkeypatch):
    """The same loop with another rounding; few rows may differ where float32 falls on the other side of a border."""
    if device_loop:
        monkeypatch.setattr(rounding_loops, "_round_block", rounding_loops._round_block_torch)
    x, weight = make_inputs(), torch.randn(ROWS, WIDTH) / 8
    spec = QuantSpec(dtype, granularity, 16 if granularity == "per_group" else None)
    gram = gram_of(x)
    (found,) = solve_gptq([weight], gram.float(), spec, torch.float32, act_order=False)
    assert found.qtensor.codes.dtype == spec.code_dtype
    scale, _ = column_qparams(found.qtensor)
    w, inverse = weight.double().clone(), torch.linalg.inv(damped(gram, DAMPING))
    codes = torch.zeros(weight.shape)
    for i in range(WIDTH):
        codes[:, i] = numerics.round_codes((w[:, i] / scale[:, i]).float(), spec)
        error = (w[:, i] - codes[:, i].double() * scale[:, i]) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, :] = inverse[:, i] = 0
        inverse[i, i] = 1
    differs = (found.qtensor.codes.float() != codes).any(1)
    assert int(differs.sum()) <= ROWS // 10
    assert found.loss < 0.7 * found.rtn_loss
    (improved,) = solve_gptq([weight], gram.float(), spec, torch.float32, act_order=False, sweeps=2)
    assert improved.loss <= found.loss * (1 + 1e-6)
    assert bool(improved.qtensor.codes.float().isfinite().all())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16", "mxfp4a16-ceil"])
@pytest.mark.parametrize("device_loop", [False, True])
def test_four_bit_floats(scheme, act_order, device_loop, monkeypatch):
    """Against the loop over columns that updates the inverse, with the scales of numerics; no refit moves them."""
    if device_loop:
        monkeypatch.setattr(rounding_loops, "_round_block", rounding_loops._round_block_torch)
    x, weight = make_inputs(), torch.randn(ROWS, WIDTH) / 8
    spec = Scheme.parse(scheme).weight
    assert spec is not None
    gram = gram_of(x)
    dtype = spec.scale_torch_dtype(torch.float32)
    (found,) = solve_gptq([weight], gram, spec, dtype, act_order=act_order)
    importance = (gram.diagonal() + DAMPING * gram.diagonal().mean()).float()
    chosen, _ = numerics.mse_qparams(weight, spec, dtype, importance=importance)
    assert torch.equal(found.qtensor.scale, chosen)
    assert found.qtensor.codes.dtype == torch.uint8
    scale, _ = column_qparams(found.qtensor)
    w, inverse = weight.double().clone(), torch.linalg.inv(damped(gram, DAMPING))
    codes, margin = torch.zeros(weight.shape), torch.zeros(weight.shape)
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    order = order_of(gram, act_order)
    for i in order.tolist():
        steps = w[:, i] / scale[:, i]
        codes[:, i] = fp4.encode(steps.float()).float()
        margin[:, i] = torch.cat([steps.abs()[:, None] - borders, steps[:, None]], 1).abs().amin(1)
        error = (w[:, i] - fp4.decode(codes[:, i]).double() * scale[:, i]) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, :] = inverse[:, i] = 0
        inverse[i, i] = 1
    assert_codes(found.qtensor.codes, codes, margin, order)
    assert found.loss < 0.7 * found.rtn_loss
    wrong = found.qtensor.dequantize().double() - weight.double()
    assert found.loss == pytest.approx(((wrong @ gram) * wrong).sum().item(), rel=1e-3)
    (improved,) = solve_gptq([weight], gram, spec, dtype, act_order=act_order, sweeps=2)
    assert torch.equal(improved.qtensor.scale, chosen)
    assert improved.loss < found.loss
