import pytest
import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.errors import CalibrationError, QCompilerError, RecipeError, WeightError
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from qcompiler.passes.solvers import gptq_solver as _gptq_solver
from qcompiler.passes.solvers.gptq_solver import solve_gptq
from tests.passes.solvers.naive_gptq import (
    DAMPING,
    EYE,
    NAN,
    ROWS,
    WEIGHT,
    WIDTH,
    assert_codes,
    gram_of,
    make_inputs,
    naive_gptq,
    order_of,
    solve,
    spec_of,
)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("granularity", ["per_group", "per_channel", "per_tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_the_naive_reference(bits: int, symmetric: bool, granularity: str, act_order: bool) -> None:
    weight, gram = torch.randn(ROWS, WIDTH), gram_of(make_inputs())
    found = solve(weight, gram, spec_of(bits, symmetric, granularity), act_order=act_order).qtensor
    expected, margin = naive_gptq(weight, gram, found, DAMPING, act_order)
    assert_codes(found.codes, expected, margin, order_of(gram, act_order))
    assert found.codes.unique().numel() > 2


@pytest.mark.parametrize("granularity", ["per_group", "per_channel", "per_tensor"])
def test_weights_solved_together_equal_weights_solved_alone(granularity: str) -> None:
    weights, gram = [torch.randn(n, WIDTH) * n for n in (ROWS, 5, 1)], gram_of(make_inputs())
    spec = spec_of(granularity=granularity)
    together = solve_gptq(weights, gram, spec, torch.bfloat16)
    for weight, solution in zip(weights, together, strict=True):
        alone = solve(weight, gram, spec)
        assert solution.qtensor.codes.untyped_storage().nbytes() == weight.numel()  # keeps no other weight alive
        torch.testing.assert_close(solution.qtensor.scale, alone.qtensor.scale, rtol=0, atol=0)
        assert_codes(solution.qtensor.codes, *naive_gptq(weight, gram, alone.qtensor, DAMPING, True), order_of(gram))
        assert solution.loss == pytest.approx(alone.loss, rel=1e-3)
        assert solution.rtn_loss == pytest.approx(alone.rtn_loss, rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_reports_the_true_losses_and_beats_round_to_nearest(symmetric: bool) -> None:
    weight, gram, spec = torch.randn(ROWS, WIDTH), gram_of(make_inputs()), spec_of(symmetric=symmetric)
    solution = solve(weight, gram, spec)
    error = (weight - solution.qtensor.dequantize()).double()
    assert solution.loss == pytest.approx(float((error @ gram * error).sum()), rel=1e-4)
    scale, zero = numerics.min_max_qparams(weight, spec, torch.bfloat16)
    error = (weight - numerics.fake_quantize(weight, scale, zero, spec)).double()
    assert solution.rtn_loss == pytest.approx(float((error @ gram * error).sum()), rel=1e-4)
    assert solution.loss < 0.5 * solution.rtn_loss


def test_act_order_and_scale_search_lower_the_loss() -> None:
    weight, gram, spec = torch.randn(ROWS, WIDTH), gram_of(make_inputs()), spec_of(bits=3)
    loss = solve(weight, gram, spec).loss
    assert loss < solve(weight, gram, spec, act_order=False).loss
    assert loss < solve(weight, gram, spec, scale_search="minmax").loss


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_are_rounded_before_codes_are_computed(scale_dtype: torch.dtype) -> None:
    weight, gram, spec = torch.randn(ROWS, WIDTH), gram_of(make_inputs()), spec_of()
    (solution,) = solve_gptq([weight], gram, spec, scale_dtype, scale_search="minmax")
    scale = solution.qtensor.scale
    assert torch.equal(scale, scale.to(scale_dtype).float())
    assert torch.equal(scale, numerics.min_max_qparams(weight, spec, scale_dtype)[0])
    first = int(order_of(gram)[0])  # no error to make good yet: rounded to nearest with the scale as stored
    assert torch.equal(solution.qtensor.codes[:, first], numerics.quantize(weight, scale, None, spec)[:, first])


def test_the_scale_search_weighs_columns_by_their_energy() -> None:
    weight, energy, spec = (
        torch.randn(ROWS, WIDTH),
        torch.logspace(-3, 3, WIDTH)[torch.randperm(WIDTH)],
        spec_of(bits=2),
    )
    gram = torch.diag(energy)  # columns do not interact: what is left is the choice of scales
    blind = numerics.fake_quantize(weight, *numerics.mse_qparams(weight, spec, torch.bfloat16), spec)
    assert solve(weight, gram, spec, damping=0.0).loss < 0.9 * float(((weight - blind).square() * energy).sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_columns_are_rounded_to_nearest(symmetric: bool) -> None:
    x, dead = make_inputs(), torch.tensor([0, 7, 16, 55])
    x[:, dead] = 0
    weight, spec = torch.randn(ROWS, WIDTH), spec_of(symmetric=symmetric)
    for options in ({}, {"sweeps": 1}, {"damping": 0.0, "sweeps": 1}, {"cross": gram_of(x, make_inputs())}):
        solution = solve(weight, gram_of(x), spec, **options)
        assert solution.dead_columns == 4
        assert solution.damping == options.get("damping", DAMPING)  # dead columns alone call for none
        found = solution.qtensor
        nearest = numerics.quantize(weight, found.scale, found.zero_point, spec)
        assert torch.equal(found.codes[:, dead], nearest[:, dead])
        assert solution.loss < solution.rtn_loss


def test_a_square_that_underflowed_counts_as_dead_whatever_stands_beside_it() -> None:
    weight, gram, spec = torch.randn(ROWS, WIDTH), gram_of(make_inputs()), spec_of()
    cross = gram.clone()
    gram[3, 3] = 0  # while the products with other columns are left
    solution = solve(weight, gram, spec, cross=cross)
    assert (solution.dead_columns, solution.damping) == (1, DAMPING)
    nearest = numerics.quantize(weight, solution.qtensor.scale, None, spec)
    assert torch.equal(solution.qtensor.codes[:, 3], nearest[:, 3])


def test_an_input_that_is_always_zero_gives_round_to_nearest() -> None:
    weight, spec = torch.randn(ROWS, WIDTH), spec_of()
    solution = solve(weight, torch.zeros(WIDTH, WIDTH), spec)
    assert solution.dead_columns == WIDTH
    assert torch.equal(solution.qtensor.codes, numerics.quantize(weight, solution.qtensor.scale, None, spec))
    assert solution.loss == solution.rtn_loss == 0


def test_damping_is_what_was_asked_for_where_that_suffices() -> None:
    assert solve(torch.randn(ROWS, WIDTH), gram_of(make_inputs()), spec_of(), damping=0.03).damping == 0.03


def test_damping_grows_until_the_factorisation_succeeds() -> None:
    weight, gram = torch.randn(ROWS, WIDTH), gram_of(make_inputs(tokens=10))
    gram -= 1e-4 * gram.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)  # rounding can leave it indefinite
    gram.diagonal().clamp_(min=1e-9)
    solution = solve(weight, gram, spec_of(), damping=0.0)
    assert 1e-4 < solution.damping <= 1e-2
    assert_codes(
        solution.qtensor.codes, *naive_gptq(weight, gram, solution.qtensor, solution.damping, True), order_of(gram)
    )


def test_fewer_tokens_than_columns_still_beat_round_to_nearest() -> None:
    solution = solve(torch.randn(ROWS, WIDTH), gram_of(make_inputs(tokens=20)), spec_of())
    assert solution.loss < 0.2 * solution.rtn_loss


def test_a_cross_gram_steers_towards_the_original_output() -> None:
    y = make_inputs()
    x = y + 0.2 * y @ torch.randn(WIDTH, WIDTH, dtype=torch.float64) / WIDTH**0.5
    weight, gram, cross = torch.randn(ROWS, WIDTH), gram_of(x), gram_of(x, y)

    def output_error(**options: object) -> float:
        solution = solve(weight, gram, spec_of(), **options)
        return float((x @ solution.qtensor.dequantize().double().T - y @ weight.double().T).square().sum())

    plain, half, whole = (output_error(cross=cross, correction=c) for c in (0.0, 0.5, 1.0))
    assert plain == output_error()
    assert whole < 0.5 * half < 0.5 * plain


def test_the_corrected_target_is_the_least_squares_solution() -> None:
    y = make_inputs()
    x = y + 0.1 * torch.randn_like(y)
    weight, gram, cross = torch.randn(ROWS, WIDTH), gram_of(x), gram_of(x, y)
    solution = solve(weight, gram, spec_of(bits=8), cross=cross, correction=1.0, damping=1e-6)
    target = torch.linalg.lstsq(x, y @ weight.double().T).solution.T
    error = solution.qtensor.dequantize() - target
    assert solution.loss == pytest.approx(float((error @ gram * error).sum()), rel=1e-2)
    assert solution.loss < 0.1 * float(((weight - target) @ gram * (weight - target)).sum())


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (3, 1), (2, 32)])
def test_small_shapes(shape: tuple[int, int]) -> None:
    weight, gram = torch.randn(shape), gram_of(make_inputs(width=shape[1]))
    found = solve(weight, gram, spec_of(), sweeps=1).qtensor
    assert found.codes.shape == shape
    assert found.codes.is_contiguous()
    plain = solve(weight, gram, spec_of()).qtensor
    assert_codes(plain.codes, *naive_gptq(weight, gram, plain, DAMPING, True), order_of(gram))


def test_inputs_are_left_alone_and_may_be_of_any_float_dtype() -> None:
    weight, gram = torch.randn(WIDTH, ROWS).bfloat16().T, gram_of(make_inputs()).float()
    gram[:, 3] = gram[3] = 0
    copies = weight.clone(), gram.clone()
    found = solve(weight, gram, spec_of(), sweeps=1, cross=gram).qtensor
    assert torch.equal(weight, copies[0])
    assert torch.equal(gram, copies[1])
    again = solve(weight.float().contiguous(), gram.double(), spec_of(), sweeps=1, cross=gram).qtensor
    assert torch.equal(found.codes, again.codes)
    assert torch.equal(found.scale, again.scale)


@pytest.mark.parametrize(
    ("weights", "gram", "options", "error", "match"),
    [
        ([], EYE, {}, WeightError, "no weight"),
        ([torch.ones(8)], EYE, {}, WeightError, "matrices"),
        ([torch.ones(0, 8)], EYE, {}, WeightError, "matrices"),
        ([WEIGHT, torch.ones(2, 7)], EYE, {}, WeightError, "weight 1 of 2"),
        ([WEIGHT * NAN], EYE, {}, WeightError, "not finite"),
        ([WEIGHT * float("inf")], EYE, {}, WeightError, "not finite"),
        ([WEIGHT], torch.eye(7), {}, CalibrationError, r"\(7, 7\)"),
        ([WEIGHT], torch.ones(8), {}, CalibrationError, "do not fit"),
        ([WEIGHT], EYE * NAN, {}, CalibrationError, "not finite"),
        ([WEIGHT], -EYE, {}, CalibrationError, "negative"),
        ([WEIGHT], EYE + 1e6 * (1 - EYE), {}, CalibrationError, "semi-definite"),
        ([WEIGHT], EYE, {"cross": torch.eye(9)}, CalibrationError, "cross"),
        ([WEIGHT], EYE, {"cross": EYE * NAN}, CalibrationError, "cross"),
        ([WEIGHT], EYE, {"damping": -0.1}, RecipeError, "damping"),
        ([WEIGHT], EYE, {"sweeps": -1}, RecipeError, "sweeps"),
        ([WEIGHT], EYE, {"correction": 2.0}, RecipeError, "correction"),
    ],
)
def test_bad_input(
    weights: list[Tensor], gram: Tensor, options: dict[str, object], error: type[QCompilerError], match: str
) -> None:
    with pytest.raises(error, match=match):
        solve_gptq(weights, gram, spec_of(), torch.float32, **options)  # type: ignore[arg-type]


def test_each_weight_has_a_factor_of_its_own():
    weights, gram = [torch.randn(ROWS, WIDTH), 5 * torch.randn(ROWS, WIDTH)], gram_of(make_inputs())
    spec = Scheme.parse("nvfp4a16").weight
    assert spec is not None
    for together, weight in zip(solve_gptq(weights, gram, spec, torch.float8_e4m3fn), weights, strict=True):
        (alone,) = solve_gptq([weight], gram, spec, torch.float8_e4m3fn)
        assert torch.equal(together.qtensor.codes, alone.qtensor.codes)
        assert together.qtensor.factor is not None
        assert together.qtensor.factor == weight.abs().max() / 2688


def test_the_factor_does_not_depend_on_the_slices_scales_are_searched_in(monkeypatch):
    weight, gram = torch.randn(ROWS, WIDTH) * torch.arange(1, ROWS + 1)[:, None], gram_of(make_inputs())
    spec = Scheme.parse("nvfp4a16").weight
    assert spec is not None
    (whole,) = solve_gptq([weight], gram, spec, torch.float8_e4m3fn)
    monkeypatch.setattr(_gptq_solver, "_SEARCH_ELEMENTS", 3 * WIDTH)
    (sliced,) = solve_gptq([weight], gram, spec, torch.float8_e4m3fn)
    assert torch.equal(whole.qtensor.scale, sliced.qtensor.scale)
    assert torch.equal(whole.qtensor.codes, sliced.qtensor.codes)


@pytest.mark.parametrize("rows", [ROWS, 13])
def test_squares(rows):
    """As groups with the scales of the squares, which are searched in whole squares and never moved."""
    weight, gram = torch.randn(rows, WIDTH) * torch.arange(1, rows + 1)[:, None], gram_of(make_inputs())
    spec = QuantSpec("float8_e5m2", "per_block", 8)
    (found,) = solve_gptq([weight], gram, spec, torch.float32, sweeps=2)
    importance = (gram.diagonal() + DAMPING * gram.diagonal().mean()).float()
    expected, _ = numerics.mse_qparams(
        weight, spec, torch.float32, importance=importance, steps=16, max_shrink=_gptq_solver._SEARCH_SHRINK
    )
    assert torch.allclose(found.qtensor.scale, expected)
    assert torch.equal(expected[::8].repeat_interleave(8, 0)[:rows], expected)
    assert found.loss < 0.7 * found.rtn_loss


def test_squares_are_searched_whole_whatever_the_slices(monkeypatch):
    weight, gram = torch.randn(ROWS, WIDTH) * torch.arange(1, ROWS + 1)[:, None], gram_of(make_inputs())
    spec = QuantSpec("float8_e5m2", "per_block", 8)
    (whole,) = solve_gptq([weight], gram, spec, torch.float32)
    monkeypatch.setattr(_gptq_solver, "_SEARCH_ELEMENTS", 3 * WIDTH)
    (sliced,) = solve_gptq([weight], gram, spec, torch.float32)
    assert torch.equal(whole.qtensor.scale, sliced.qtensor.scale)
    assert torch.equal(whole.qtensor.codes.float(), sliced.qtensor.codes.float())
