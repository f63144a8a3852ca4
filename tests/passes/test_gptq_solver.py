import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qcompiler import fp4, numerics
from qcompiler.errors import CalibrationError, QCompilerError, RecipeError, WeightError
from qcompiler.passes import _gptq_solver
from qcompiler.passes._gptq_solver import GPTQSolution, solve_gptq
from qcompiler.qtensor import Affine
from qcompiler.spec import QuantSpec, Scheme

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


@pytest.mark.parametrize("path", ["slices of rows", "torch"])
def test_other_paths_equal_the_naive_reference(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "torch":
        monkeypatch.setattr(_gptq_solver, "_round_block", _gptq_solver._round_block_torch)
    else:
        monkeypatch.setattr(_gptq_solver, "_ROWS", 7)
        monkeypatch.setattr(_gptq_solver, "_SEARCH_ELEMENTS", 5 * WIDTH)
    weight, gram = torch.randn(ROWS, WIDTH), gram_of(make_inputs())
    found = solve(weight, gram, spec_of(symmetric=False)).qtensor
    assert_codes(found.codes, *naive_gptq(weight, gram, found, DAMPING, True), order_of(gram))


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


NAN, EYE, WEIGHT = float("nan"), torch.eye(8), torch.ones(2, 8)


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


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("device_loop", [False, True])
def test_float_codes(dtype, granularity, device_loop, monkeypatch):
    """The same loop with another rounding; few rows may differ where float32 falls on the other side of a border."""
    if device_loop:
        monkeypatch.setattr(_gptq_solver, "_round_block", _gptq_solver._round_block_torch)
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
        monkeypatch.setattr(_gptq_solver, "_round_block", _gptq_solver._round_block_torch)
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
