"""Scales of the range, and scales that are searched for."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from qcompiler import numerics
from qcompiler.numerics import arithmetic
from qcompiler.numerics.spec import QuantSpec
from tests.numerics.made_up import SCALE_DTYPES, SPECS, matrices, squared_error
from tests.numerics.test_arithmetic import specs


@settings(max_examples=150, deadline=None)
@given(matrices(), specs, st.sampled_from(SCALE_DTYPES))
def test_min_max_covers(x, spec, scale_dtype):
    scale, zero = numerics.min_max_qparams(x, spec, scale_dtype)
    group = spec.group_of(x.shape[1])
    assert scale.dtype == torch.float32
    assert scale.shape == (x.shape[0], math.ceil(x.shape[1] / group))
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert torch.equal(scale, scale.to(scale_dtype).float())
    assert (zero is None) == spec.symmetric
    if zero is not None:
        assert zero.dtype == torch.uint8
        assert zero.shape == scale.shape
        assert zero.max() <= spec.quant_max
    # Half a step everywhere; and the ends move by what the scale (and the zero point, half a code) was rounded by.
    step = numerics.expand_groups(scale, x.shape[1], group)
    rounding = torch.finfo(scale_dtype).eps * step + (2.0**-25 if scale_dtype == torch.float16 else 0)
    limit = step * (0.5 if spec.symmetric else 1.0) + 2**spec.bits * rounding
    assert ((numerics.fake_quantize(x, scale, zero, spec) - x).abs() <= limit).all()


def test_min_max_reference_values():
    spec = QuantSpec("int4", "per_channel", None)
    x = torch.tensor([[-7.5, 3.0], [0.75, -0.3]])
    assert numerics.min_max_qparams(x, spec, torch.float32)[0].flatten().tolist() == pytest.approx([1.0, 0.1])
    scale, zero = numerics.min_max_qparams(
        torch.tensor([[-0.5, 1.0], [2.0, 3.0], [-3.0, -1.0]]),
        QuantSpec("int4", "per_channel", None, symmetric=False),
        torch.float32,
    )
    assert scale.flatten().tolist() == pytest.approx([0.1, 0.2, 0.2])  # the range always holds zero
    assert zero is not None
    assert zero.flatten().tolist() == [5, 0, 15]


def test_zero_is_exact():
    x = torch.tensor([[0.0, 1.3, 2.9, -0.7]])
    for spec in SPECS:
        assert numerics.fake_quantize(x, *numerics.min_max_qparams(x, spec, torch.float16), spec)[0, 0] == 0


@pytest.mark.parametrize("choose", [numerics.min_max_qparams, numerics.mse_qparams])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_all_zero_groups(choose, spec):
    x = torch.zeros(2, 32)
    scale, zero = choose(x, spec, torch.float16)
    assert (scale == 1).all()
    assert (numerics.fake_quantize(x, scale, zero, spec) == 0).all()


@pytest.mark.parametrize("choose", [numerics.min_max_qparams, numerics.mse_qparams])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e-12, 1e-7, 1e5, 1e30, 3e38])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_scales_stay_positive_and_finite(choose, symmetric, magnitude, scale_dtype):
    x = torch.linspace(-1, 1, 64).reshape(2, 32) * magnitude
    spec = QuantSpec("int4", "per_channel", None, symmetric)
    scale, zero = choose(x, spec, scale_dtype)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert numerics.fake_quantize(x, scale, zero, spec).isfinite().all()


def test_small_weights_keep_their_resolution_in_float16():
    x = torch.randn(4, 64) * 1e-4  # the scale, 2e-6, is subnormal
    spec = QuantSpec("int8", "per_channel", None)
    found = numerics.fake_quantize(x, *numerics.min_max_qparams(x, spec, torch.float16), spec)
    assert numerics.sqnr_db(x, found) > 35


@settings(max_examples=60, deadline=None)
@given(matrices(), specs, st.sampled_from(SCALE_DTYPES), st.booleans())
def test_search_is_never_worse_than_min_max(x, spec, scale_dtype, weighted):
    importance = torch.rand(x.shape[1]) ** 4 if weighted else torch.ones(x.shape[1])
    found = numerics.mse_qparams(x, spec, scale_dtype, importance=importance if weighted else None)
    full = numerics.min_max_qparams(x, spec, scale_dtype)
    assert torch.equal(found[0], found[0].to(scale_dtype).float())
    assert found[0].shape == full[0].shape
    least, most = (squared_error(x, qparams, spec, importance) for qparams in (found, full))
    slack = 1e-12 * (importance * x.square()).sum()  # rounding in float32
    assert (least <= most * (1 + 1e-4) + slack).all()


def test_search_keeps_the_full_range_where_rounding_spoils_the_found_scale():
    spec, importance = QuantSpec("int8", "per_group", 16), torch.ones(256)
    x = torch.randn(64, 256)  # without the comparison, bfloat16 scales make one group in twenty worse
    found, full = (choose(x, spec, torch.bfloat16) for choose in (numerics.mse_qparams, numerics.min_max_qparams))
    least, most = (squared_error(x, qparams, spec, importance) for qparams in (found, full))
    assert (least <= most * (1 + 1e-4)).all()
    assert (least < most * 0.99).any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["per_group", "per_channel", "per_tensor"])
@pytest.mark.parametrize(("bits", "tolerance", "gain"), [(2, 1.02, 1.5), (3, 1.02, 1.2), (4, 1.02, 1.05), (8, 1.04, 1)])
def test_search_comes_near_exhaustive_search(bits, tolerance, gain, granularity, symmetric, weighted):
    spec = QuantSpec(f"int{bits}", granularity, 128 if granularity == "per_group" else None, symmetric)
    x = torch.randn(8, 512)
    importance = torch.rand(512) if weighted else torch.ones(512)
    found = numerics.mse_qparams(x, spec, torch.float32, importance=importance if weighted else None)
    full, zero = numerics.min_max_qparams(x, spec, torch.float32)
    grid = [squared_error(x, (full * keep, zero), spec, importance) for keep in torch.linspace(0.2, 1.0, 200)]
    best = torch.stack(grid).amin(0).sum()
    error = squared_error(x, found, spec, importance).sum()
    assert error <= tolerance * best
    assert squared_error(x, (full, zero), spec, importance).sum() >= gain * error


def test_padding_of_a_short_last_group_does_not_count():
    spec = QuantSpec("int3", "per_group", 16)
    x = torch.randn(8, 20)
    found, _ = numerics.mse_qparams(x, spec, torch.float32)
    alone, _ = numerics.mse_qparams(x[:, 16:], QuantSpec("int3", "per_channel", None), torch.float32)
    torch.testing.assert_close(found[:, 1:], alone)


def test_columns_without_importance_do_not_count():
    spec = QuantSpec("int4", "per_channel", None)
    x = torch.randn(4, 64)
    x[:, 0] = 9.0
    importance = torch.ones(64)
    importance[0] = 0
    scale, _ = numerics.mse_qparams(x, spec, torch.float32, importance=importance)
    assert (scale < 0.5 * numerics.min_max_qparams(x, spec, torch.float32)[0]).all()


# --- squares ----------------------------------------------------------------------------------------------------------

SHAPES = [(16, 24), (13, 21), (8, 5), (3, 20), (1, 1)]  # squares of 8, whole and not


def square_spec(dtype: str = "float8_e4m3fn") -> QuantSpec:
    return QuantSpec(dtype, "per_block", 8)


def square_sums(values: Tensor) -> Tensor:
    """float64 ``[blocks down, blocks along]``."""
    return torch.stack(
        [torch.stack([part.double().sum() for part in strip.split(8, 1)]) for strip in values.split(8, 0)]
    )


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_squares_equal_plain_python(shape, dtype):
    spec, x = square_spec(dtype), torch.randn(shape) ** 3 - 0.5
    scale, zero = numerics.min_max_qparams(x, spec, torch.float32)
    assert zero is None
    assert scale.shape == (shape[0], -(-shape[1] // 8))
    found = numerics.fake_quantize(x, scale, None, spec)
    for i in range(shape[0]):
        for j in range(shape[1]):
            top, left = i // 8 * 8, j // 8 * 8
            expected = x[top : top + 8, left : left + 8].abs().max() / spec.quant_max
            assert scale[i, j // 8] == expected
            code = (x[i, j] / expected).clamp(-spec.quant_max, spec.quant_max).to(spec.code_dtype)
            assert found[i, j] == code.float() * expected


@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_searched_scales_of_squares(shape, importance, monkeypatch):
    """Never worse than the full range, and that of each square alone, as one tensor."""
    monkeypatch.setattr(arithmetic, "_SLICE_ELEMENTS", 200)
    spec, x = square_spec("float8_e5m2"), torch.randn(shape)
    cost = torch.rand(shape[1]) + 0.1 if importance else torch.ones(shape[1])
    found, _ = numerics.mse_qparams(x, spec, torch.float32, importance=cost if importance else None)
    full, _ = numerics.min_max_qparams(x, spec, torch.float32)
    errors = [square_sums((numerics.fake_quantize(x, s, None, spec) - x).square() * cost) for s in (found, full)]
    assert bool((errors[0] <= errors[1]).all())
    alone = QuantSpec("float8_e5m2", "per_tensor", None)
    for top in range(0, shape[0], 8):
        for left in range(0, shape[1], 8):
            part, columns = x[top : top + 8, left : left + 8], slice(left, left + 8)
            expected, _ = numerics.mse_qparams(
                part, alone, torch.float32, importance=cost[columns] if importance else None
            )
            assert torch.allclose(found[top : top + 8, left // 8], expected.flatten(), rtol=1e-4)


def test_scales_of_squares_by_the_gram_matrix():
    spec, x, inputs = square_spec("float8_e5m2"), torch.randn(13, 21), torch.randn(80, 21) @ torch.randn(21, 21)
    gram = inputs.T @ inputs

    def errors(scale: Tensor) -> Tensor:
        wrong = numerics.fake_quantize(x, scale, None, spec) - x
        blocks = torch.block_diag(*(gram[s : s + 8, s : s + 8] for s in range(0, 21, 8)))
        return square_sums((wrong @ blocks) * wrong)

    found, _ = numerics.gram_qparams(x, spec, torch.float32, gram)
    full, _ = numerics.min_max_qparams(x, spec, torch.float32)
    assert bool((errors(found) <= errors(full) * (1 + 1e-5)).all())
    assert errors(found).sum() < 0.95 * errors(full).sum()
    assert torch.equal(found[::8].repeat_interleave(8, 0)[:13], found)
