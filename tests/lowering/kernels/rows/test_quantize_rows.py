"""Activations to codes: the CPU operators against `choose_qparams` and `quantize`, and what they refuse."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from qcompiler.errors import InputError
from qcompiler.lowering.kernels.rows import quantize_rows as module

kernels = torch.ops.qcompiler_kernels
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, shapes and dtypes too."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def rows(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Rows of very different size, one of them zeros."""
    x = torch.randn(*shape) * torch.logspace(-3, 3, shape[-2])[:, None]
    x[..., 1, :] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codes", CODES)
def test_rows_are_those_of_choose_qparams_and_quantize(dtype, codes):
    x = rows(dtype, 2, 9, 70)
    got, scale = kernels.quantize_rows(x, codes)
    wide = x.float()
    expected, _ = torch.ops.qcompiler.choose_qparams(wide, codes, -1)
    assert same(scale, expected)
    assert scale.shape == (2, 9, 1)
    assert same(got, torch.ops.qcompiler.quantize(wide, expected, None, -1, 70, codes))
    assert all(same(*pair) for pair in zip((got, scale), module.quantize_rows_reference(x, codes), strict=True))


@pytest.mark.parametrize(("clip", "bits"), [(0.8, 8), (1.0, 4), (0.9, 4)])
def test_clip_and_bits(clip, bits):
    x = rows(torch.float32, 6, 40)
    got, scale = kernels.quantize_rows(x, torch.int8, clip, bits)
    expected, _ = torch.ops.qcompiler.choose_qparams(x, torch.int8, -1, bits, clip)
    assert same(scale, expected)
    assert same(got, torch.ops.qcompiler.quantize(x, expected, None, -1, 40, torch.int8, bits))
    assert got.max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [4, 8])
def test_affine_rows(bits):
    x = rows(torch.float32, 6, 40) + 0.3
    got, scale, zero = kernels.quantize_rows_affine(x, 1.0, bits)
    for mine, reference in zip((got, scale, zero), module.quantize_rows_affine_reference(x, 1.0, bits), strict=True):
        assert same(mine, reference)
    restored = (got.float() - zero.float()) * scale
    assert ((restored - x).abs() <= scale * 0.501).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codes", [*CODES, torch.uint8])
def test_static(dtype, codes):
    x = rows(dtype, 5, 33)
    scale = torch.tensor(0.37)
    zero = torch.tensor(97, dtype=torch.uint8) if codes == torch.uint8 else None
    got = kernels.quantize_static(x, scale, codes, zero)
    assert same(got, torch.ops.qcompiler.quantize(x.float(), scale, zero, 0, 0, codes))
    assert same(got, module.quantize_static_reference(x, scale, codes, zero))


def test_signed_codes_may_have_a_zero_point():
    """uint8 codes less 128: the same numbers in a dtype that matrix products take."""
    x, scale, zero = torch.randn(5, 33) * 20, torch.tensor(0.37), torch.tensor(97, dtype=torch.uint8)
    unsigned = kernels.quantize_static(x, scale, torch.uint8, zero)
    signed = kernels.quantize_static(x, scale, torch.int8, (zero.int() - 128).to(torch.int8))
    assert torch.equal(signed.int() + 128, unsigned.int())


@pytest.mark.parametrize("codes", CODES)
def test_norm_and_quantize(codes):
    x, weight = rows(torch.bfloat16, 7, 48), torch.rand(48).bfloat16() + 0.5
    normed = torch.ops.qcompiler.rms_norm(x, weight, 1e-6)
    got, scale = kernels.rms_norm_quantize_rows(x, weight, 1e-6, codes)
    expected = kernels.quantize_rows(normed, codes)
    assert same(got, expected[0])
    assert same(scale, expected[1])
    assert same(got, module.rms_norm_quantize_rows_reference(x, weight, 1e-6, codes)[0])
    static = kernels.rms_norm_quantize_static(x, weight, 1e-6, torch.tensor(0.02), codes)
    assert same(static, kernels.quantize_static(normed, torch.tensor(0.02), codes))
    assert same(static, module.rms_norm_quantize_static_reference(x, weight, 1e-6, torch.tensor(0.02), codes))


def test_input_is_not_overwritten():
    x = torch.randn(4, 8)
    before = x.clone()
    kernels.quantize_rows(x, torch.int8)
    kernels.quantize_static(x, torch.tensor(0.1), torch.int8)
    assert torch.equal(x, before)


def test_views_are_taken():
    x = torch.randn(8, 5)
    assert same(kernels.quantize_rows(x.t(), torch.int8)[0], kernels.quantize_rows(x.t().contiguous(), torch.int8)[0])


def test_no_rows():
    codes, scale = kernels.quantize_rows(torch.empty(0, 16), torch.int8)
    assert codes.shape == (0, 16)
    assert scale.shape == (0, 1)


def test_a_row_that_is_not_finite_has_no_finite_scale():
    x = torch.randn(3, 16)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    _, scale = kernels.quantize_rows(x, torch.int8)
    assert scale[:, 0].isfinite().tolist() == [True, False, False]


def test_shapes_without_values():
    with FakeTensorMode():
        x, weight, scale = torch.empty(2, 3, 16, dtype=torch.float16), torch.empty(16), torch.empty(())
        codes, per_row = kernels.quantize_rows(x, torch.float8_e4m3fn)
        assert (codes.dtype, codes.shape, per_row.dtype, per_row.shape) == (
            torch.float8_e4m3fn,
            x.shape,
            torch.float32,
            (2, 3, 1),
        )
        assert [t.dtype for t in kernels.quantize_rows_affine(x)] == [torch.uint8, torch.float32, torch.uint8]
        assert kernels.quantize_static(x, scale, torch.int8).dtype == torch.int8
        assert kernels.rms_norm_quantize_rows(x, weight, 1e-6, torch.int8)[1].shape == (2, 3, 1)
        assert kernels.rms_norm_quantize_static(x, weight, 1e-6, scale, torch.int8).shape == x.shape


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: kernels.quantize_rows(torch.ones(2, 3, dtype=torch.int32), torch.int8), "floating point rows"),
        (lambda: kernels.quantize_rows(torch.tensor(1.0), torch.int8), "floating point rows"),
        (lambda: kernels.quantize_rows(torch.ones(2, 3), torch.int32), "no dtype of codes"),
        (lambda: kernels.quantize_rows(torch.ones(2, 3), torch.uint8), "need a zero point"),
        (lambda: kernels.quantize_rows(torch.ones(2, 0), torch.int8), "no elements"),
        (lambda: kernels.quantize_rows(torch.ones(2, 3), torch.int8, 1.5), "share"),
        (lambda: kernels.quantize_rows(torch.ones(2, 3), torch.float8_e4m3fn, 1.0, 4), "number of bits"),
        (lambda: kernels.quantize_static(torch.ones(2, 3), torch.ones(3), torch.int8), "one scale"),
        (
            lambda: kernels.quantize_static(torch.ones(2, 3), torch.tensor(1.0), CODES[1], torch.tensor(3)),
            "no zero point",
        ),
        (lambda: kernels.rms_norm_quantize_rows(torch.ones(2, 3), torch.ones(4), 1e-6, torch.int8), "norm"),
        (
            lambda: module.check(
                torch.ones(2, 3), torch.int8, 8, has_zero_point=False, weight=torch.ones(3, device="meta")
            ),
            "different devices",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()
